# export <path> <tmp> <nonce>: writes the patch to <tmp>/bothy-export-<nonce>/patch and prints its size in bytes, the
# number of files and the number of commits since the import.
#
# A git directory of our own borrows the repository's objects, so that its configuration, hooks and filters are never
# read, and new objects, the index and locks stay out of it: the repository is only read.
path=$1 tmp=$2 nonce=$3
command -v git >/dev/null 2>&1 || exit 40
[ -d "$path/.git" ] && [ ! -L "$path/.git" ] || exit 50
rm -rf -- "$tmp"/bothy-export-*
work=$tmp/bothy-export-$nonce
mkdir -m 700 -- "$work"
export HOME="$work"
r() { g --git-dir="$path/.git" "$@"; }
base=$(r rev-parse -q --verify 'refs/bothy/base^{commit}') || exit 51
import=$(r rev-parse -q --verify 'refs/bothy/import^{tree}') || exit 51
commits=0
if head=$(r rev-parse -q --verify 'HEAD^{commit}'); then commits=$(r rev-list --count "$head" "^$base"); fi
format=$(r rev-parse --show-object-format)

git init -q --bare --template= --object-format="$format" "$work/git"
mkdir -p "$work/git/objects/info" "$work/git/info"
printf '%s\n' "$path/.git/objects" >"$work/git/objects/info/alternates"
if [ -f "$path/.git/info/exclude" ]; then cp -- "$path/.git/info/exclude" "$work/git/info/exclude"; fi
export GIT_DIR="$work/git" GIT_WORK_TREE="$path" GIT_INDEX_FILE="$work/index"
cd "$path"
# With its time: git tells by it which entries it cannot trust.
if [ -f .git/index ]; then cp -p -- .git/index "$work/index"; fi
if ! g add -u . 2>"$work/why"; then
    # An index that cannot be read or stands on its own no longer: start from the import and read every file.
    rm -f -- "$work/index" "$work/index.lock"
    g read-tree "$import"
    g add -u .
fi
add_others
# Imported files that are ignored by now, or were dropped from the index only, are there still.
g diff-index --cached --no-renames --name-only -z --diff-filter=D "$import" >"$work/gone"
if [ -s "$work/gone" ]; then g update-index -z --add --remove --replace --stdin <"$work/gone"; fi
tree=$(g write-tree)
if [ "$tree" = "$import" ]; then
    : >"$work/patch"
else
    g diff-tree -p -r --binary --full-index --no-ext-diff --no-textconv --no-color -M --ignore-submodules=all \
        --src-prefix=a/ --dst-prefix=b/ -U3 "$import" "$tree" >"$work/patch"
fi
size=$(wc -c <"$work/patch")
files=$(grep -ac '^diff --git ' "$work/patch" || true)
printf '%s %s %s\n' "$size" "$files" "$commits"
