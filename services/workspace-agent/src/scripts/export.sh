# export <path> <tmp> <nonce> <format> <since>: writes the patch or bundle to <tmp>/bothy-export-<nonce>/out and prints what it
# found, a `name=value` a line. <since> is a revision, or empty for the import; submodules are always told of since the import.
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
# How the repository $path was imported, and where it is now.
imported() {
    r cat-file --batch-check='%(objectname)' >"$work/names" <<'END'
refs/bothy/base^{commit}
refs/bothy/base^{tree}
refs/bothy/import^{tree}
refs/bothy/tracked^{tree}
HEAD^{commit}
END
    { read -r base && read -r base_tree && read -r import && read -r tracked && read -r head; } <"$work/names"
    case $base$import in *' '*) return 1 ;; esac
    case $tracked in *' '*) tracked= ;; esac
    case $head in *' '*) head= ;; esac
}
imported || exit 51
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
# difference <from> <to> <prefix>: a patch of the files, whose names are below <prefix>.
difference() {
    g diff-tree -p -r --binary --full-index --no-ext-diff --no-textconv --no-color -M --ignore-submodules=all \
        --src-prefix="a/$3" --dst-prefix="b/$3" -U3 "$1" "$2"
}
# nested <from> <to> <prefix> <list>: adds to the list the repositories inside the repository that came to it since, after a snapshot.
nested() {
    if [ -s "$work/others" ]; then sed -z -n "s|/\$||p" <"$work/others"; fi >"$work/inner"
    if [ -f "$path/.gitmodules" ]; then
        g diff-tree -r --raw -z --no-renames "$1" "$2" | sed -z -n '/^:[0-7]* 160000 /{n;p}' >>"$work/inner"
    fi
    tr '\n\0' '?\n' <"$work/inner" | while IFS= read -r inner; do printf '%s\n' "$3$inner"; done >>"$4"
}
# module <name>: how a submodule that was imported stands; its patch goes to <work>/out where a patch is wanted. Prints a word:
# `same`, `changed`, `commits` where its HEAD is another, `gone`, or `left` where it is no import any longer.
module() (
    name=$1 top=$work out=$work/out since=
    path=$path/$name work=$work/module
    if [ ! -d "$path/.git" ] || [ -L "$path/.git" ]; then
        echo gone
        return
    fi
    unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE
    rm -rf -- "$work"
    mkdir -- "$work"
    if ! imported 2>/dev/null; then
        echo left
        return
    fi
    borrow "$base"
    word=same
    if ! same; then
        snapshot "$import"
        if [ "$tree" != "$import" ]; then
            word=changed
            if [ "$wanted" = patch ]; then difference "$import" "$tree" "$name/" >>"$out"; fi
        fi
        nested "$import" "$tree" "$name/" "$top/nested"
        if [ "$head" != "$base" ]; then word=commits; fi
    fi
    echo "$word"
)
wanted=$format
if [ "$format" = patch ] && same; then format=nothing; fi
case $format in
nothing) ;;
patch)
    snapshot "$import"
    if [ -n "$since" ]; then tree_from=$(g rev-parse "$tree_from"); fi
    if [ "$tree" != "$tree_from" ]; then
        difference "$tree_from" "$tree" '' >"$work/out"
    fi
    if [ "$tree" != "$import" ] || [ -s "$work/others" ]; then nested "$import" "$tree" '' "$work/nested"; fi
    ;;
*)
    count() { tr -cd '\0' | wc -c; }
    if ! g ls-files -s >/dev/null 2>&1; then
        rm -f -- "$work/index" "$work/index.lock"
        g read-tree "$import"
    fi
    g update-index -q --refresh >/dev/null 2>&1 || true
    echo "staged=$(g diff-index --cached --no-renames --ignore-submodules=all --name-only -z "${head:-$import}" | count)"
    echo "unstaged=$(g diff-files --ignore-submodules=all --name-only -z | count)"
    echo "untracked=$(g ls-files -z --others --exclude-standard | count)"
    ;;
esac
if [ "$format" = bundle ] && [ "$commits" -gt 0 ]; then
    if [ -f "$path/.git/shallow" ]; then cp -- "$path/.git/shallow" "$work/git/shallow"; fi
    g update-ref refs/bothy/export "$head"
    g bundle create -q "$work/out" refs/bothy/export "^$from"
fi

# Submodules, and other repositories that came to be inside this one.
: >>"$work/nested"
if [ -f "$path/.git/bothy-modules" ]; then
    while IFS= read -r line; do
        name=${line#?}
        case $line in
        +*)
            word=$(module "$name")
            [ "$word" = same ] || printf '%s %s\n' "$word" "$name" >>"$work/modules"
            ;;
        *) if [ -e "$path/$name/.git" ]; then printf 'left %s\n' "$name" >>"$work/modules"; fi ;;
        esac
    done <"$path/.git/bothy-modules"
fi
# One that was imported and has moved on is known by now.
if [ -s "$work/nested" ]; then
    [ -f "$path/.git/bothy-modules" ] && sed 's/^.//' <"$path/.git/bothy-modules" >"$work/known" || : >"$work/known"
    grep -a -v -x -F -f "$work/known" <"$work/nested" | sed 's/^/left /' >>"$work/modules" || true
fi
if [ "$wanted" = patch ] && [ -s "$work/out" ]; then files=$(grep -ac '^diff --git ' "$work/out" || true); fi
if [ -s "$work/out" ]; then bytes=$(wc -c <"$work/out"); fi
printf '%s\n' "bytes=$bytes" "files=$files" "commits=$commits" "behind=$behind" "base=$base" "head=$head" "tracked=$tracked"
echo "branch=$(r symbolic-ref -q --short HEAD || true)"
# Last, and not all of them: what a script may print has an end.
if [ -s "$work/modules" ]; then
    echo "modules=$(wc -l <"$work/modules")"
    # A name that is not ASCII may be cut in the middle of a character.
    head -n 20 <"$work/modules" | cut -b 1-200 | tr -c '\n -~' '?' | sed 's/^/module=/'
fi
