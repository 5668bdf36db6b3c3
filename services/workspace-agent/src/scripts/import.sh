# import <path> <nonce> <head> <format> <branch> <name> <email>: builds the repository from the pack beside <path> and
# renames it into place. The last three may be empty.
path=$1 nonce=$2 head=$3 format=$4 branch=$5 name=$6 email=$7
work=${path%/*}/.bothy-import-$nonce
pack=$work/pack
export HOME="$work"
# A tar stream that ends between two entries looks whole to tar.
[ -f "$pack/end" ] || exit 44
export GIT_AUTHOR_NAME=bothy GIT_AUTHOR_EMAIL=bothy@localhost GIT_AUTHOR_DATE='@0 +0000'
export GIT_COMMITTER_NAME=bothy GIT_COMMITTER_EMAIL=bothy@localhost GIT_COMMITTER_DATE='@0 +0000'
git init -q --template= --object-format="$format" "$work/repo"
cd "$work/repo"
mkdir -p .git/info .git/hooks
g bundle unbundle "$pack/history.bundle" >/dev/null
rm -f -- "$pack/history.bundle"
if [ -f "$pack/shallow" ]; then
    # The boundary of other branches is not here, and must not be named.
    g cat-file --batch-check='%(objectname) %(objecttype)' <"$pack/shallow" | sed -n 's/ commit$//p' >.git/shallow
fi
g cat-file -e "$head^{commit}"
if [ -n "$branch" ]; then
    g check-ref-format "refs/heads/$branch"
    g update-ref "refs/heads/$branch" "$head"
    g symbolic-ref HEAD "refs/heads/$branch"
else
    g update-ref --no-deref HEAD "$head"
fi
g update-ref refs/bothy/base "$head"

# The working tree as it was, first as a tree: git then writes the files, so no attribute of a file can come out wrong.
export GIT_INDEX_FILE="$work/index"
g read-tree "$head"
if [ -s "$pack/tracked.patch" ]; then g apply --cached --whitespace=nowarn --allow-empty "$pack/tracked.patch"; fi
tree=$(g write-tree)
tracked=$tree
unset GIT_INDEX_FILE
g read-tree --reset -u "$tree"
# The index as it was: unchanged files keep what git knows of them, so that the first `git status` reads no content.
g read-tree -m "$head"
if [ -s "$pack/staged.patch" ]; then g apply --cached --whitespace=nowarn --allow-empty "$pack/staged.patch"; fi
g update-index -q --refresh >/dev/null || true

export GIT_INDEX_FILE="$work/index"
if [ -d "$pack/untracked" ]; then
    cp -R -P -p -- "$pack/untracked/." .
    chmod 755 .
    add_others
    tree=$(g write-tree)
fi
unset GIT_INDEX_FILE
import=$(g commit-tree -p "$head" -m 'the working tree as it was imported' "$tree")
g update-ref refs/bothy/import "$import"
# The same without what is not tracked: that of the host can be compared with it.
g update-ref refs/bothy/tracked "$tracked"
if [ -n "$name" ]; then g config user.name "$name"; fi
if [ -n "$email" ]; then g config user.email "$email"; fi

cd /
# rename(2) replaces an empty directory and nothing else.
mv -T -- "$work/repo" "$path"
