# export <path> <tmp> <nonce> <format> <since>: writes the patch or bundle to <tmp>/bothy-export-<nonce>/out and prints what it
# found, a `name=value` a line. <since> is a revision, or empty for the import.
path=$1 tmp=$2 nonce=$3 format=$4 since=$5
command -v git >/dev/null 2>&1 || exit 40
[ -d "$path/.git" ] && [ ! -L "$path/.git" ] || exit 50
for left in "$tmp"/bothy-export-*; do
    if [ -e "$left" ]; then rm -rf -- "$left"; fi
done
work=$tmp/bothy-export-$nonce
mkdir -m 700 -- "$work"
export HOME="$work"
# Nothing to be read is nothing to be kept.
trap '[ -s "$work/out" ] || rm -rf -- "$work"' EXIT
r cat-file --batch-check='%(objectname)' >"$work/names" <<'END'
refs/bothy/base^{commit}
refs/bothy/base^{tree}
refs/bothy/import^{tree}
refs/bothy/tracked^{tree}
HEAD^{commit}
END
{ read -r base && read -r base_tree && read -r import && read -r tracked && read -r head; } <"$work/names"
case $base$import in *' '*) exit 51 ;; esac
case $tracked in *' '*) tracked= ;; esac
case $head in *' '*) head= ;; esac
from=$base tree_from=$import
if [ -n "$since" ]; then
    from=$(r rev-parse -q --verify --end-of-options "$since^{commit}" 2>/dev/null) || exit 52
    tree_from=$from^{tree}
fi
commits=0 behind=0
if [ -n "$head" ] && { [ "$head" != "$base" ] || [ -n "$since" ]; }; then
    commits=$(r rev-list --count "$head" "^$from")
    behind=$(r rev-list --count "$base" "^$head")
fi
borrow "$base"
: >"$work/out"
files=0 bytes=0
# One look is enough where nothing was done, and the import had nothing that its commit has not.
same() {
    [ "$head$base_tree$since" = "$base$import" ] || return 1
    g status --porcelain -z --untracked-files=all --no-renames --ignore-submodules=all >"$work/changes" || return 1
    [ ! -s "$work/changes" ]
}
if [ "$format" = patch ] && same; then format=nothing; fi
case $format in
nothing) ;;
patch)
    snapshot "$import"
    if [ -n "$since" ]; then tree_from=$(g rev-parse "$tree_from"); fi
    if [ "$tree" != "$tree_from" ]; then
        g diff-tree -p -r --binary --full-index --no-ext-diff --no-textconv --no-color -M --ignore-submodules=all \
            --src-prefix=a/ --dst-prefix=b/ -U3 "$tree_from" "$tree" >"$work/out"
        files=$(grep -ac '^diff --git ' "$work/out" || true)
    fi
    ;;
*)
    count() { tr -cd '\0' | wc -c; }
    if ! g ls-files -s >/dev/null 2>&1; then
        rm -f -- "$work/index" "$work/index.lock"
        g read-tree "$import"
    fi
    g update-index -q --refresh >/dev/null 2>&1 || true
    echo "staged=$(g diff-index --cached --no-renames --name-only -z "${head:-$import}" | count)"
    echo "unstaged=$(g diff-files --name-only -z | count)"
    echo "untracked=$(g ls-files -z --others --exclude-standard | count)"
    ;;
esac
if [ "$format" = bundle ] && [ "$commits" -gt 0 ]; then
    if [ -f "$path/.git/shallow" ]; then cp -- "$path/.git/shallow" "$work/git/shallow"; fi
    g update-ref refs/bothy/export "$head"
    g bundle create -q "$work/out" refs/bothy/export "^$from"
fi
if [ -s "$work/out" ]; then bytes=$(wc -c <"$work/out"); fi
printf '%s\n' "bytes=$bytes" "files=$files" "commits=$commits" "behind=$behind" "base=$base" "head=$head" "tracked=$tracked"
echo "branch=$(r symbolic-ref -q --short HEAD || true)"
