# sync <path> <nonce> <tree> <force>: brings what has changed in the tracked files of the user's repository, whose tree is <tree> by
# now, into the working tree of the import <path>. Commits, index and HEAD stay. What both sides changed is a conflict: it stays
# as it is here, or with <force> becomes what it is there. Prints `changed=<files>`, `conflicts=<files>`, and a `conflict=<name>` for
# the first few.
#
# Four trees: the import's, what the user's side makes of it (theirs), the working tree now (ours), and the merge of the two.
path=$1 nonce=$2 theirs_tracked=$3 force=$4
work=${path%/*}/.bothy-import-$nonce
pack=$work/pack
export HOME="$work"
[ -f "$pack/end" ] || exit 44
r cat-file --batch-check='%(objectname)' >"$work/names" <<'END'
refs/bothy/base^{commit}
refs/bothy/import^{tree}
refs/bothy/tracked^{tree}
END
{ read -r base && read -r import && read -r tracked; } <"$work/names"
case $base$import$tracked in *' '*) exit 51 ;; esac
store=$path/.git/objects
borrow "$base"

# What the references will name has to be the repository's own; all other trees go with $work.
own() { GIT_OBJECT_DIRECTORY=$store g "$@"; }
# with <index> <command...>
with() (
    export GIT_INDEX_FILE="$work/$1"
    shift
    "$@"
)
# merge <index> <before> <ours> <theirs>: what is left for people to decide is in $work/unmerged. Where a file took the place of a
# directory git leaves it unmerged, even if nothing is left of the directory: then there is nothing to decide.
merge() {
    with "$1" g read-tree -i -m --aggressive "$2" "$3" "$4"
    with "$1" g ls-files -u -z >"$work/unmerged"
    [ -s "$work/unmerged" ] || return 0
    sed -z 's/^[^\t]*\t//' <"$work/unmerged" | sort -z | uniq -zu >"$work/alone"
    with "$1" g ls-files -z | sed -zn ':up;s|/[^/]*$||p;tup' | sort -zu | comm -z -23 "$work/alone" - >"$work/free"
    [ -s "$work/free" ] || return 0
    with "$1" xargs -0 git -c safe.directory='*' ls-files -u -z -- <"$work/free" >"$work/settled"
    with "$1" g update-index -z --force-remove --stdin <"$work/free"
    sed -z 's/^\([0-7]* [0-9a-f]*\) [123]\t/\1\t/' <"$work/settled" | with "$1" g update-index -z --index-info
    with "$1" g ls-files -u -z >"$work/unmerged"
}
# settle <side> <index>: gives what is unmerged in $work/unmerged the content of that side (1: before, 2: ours, 3: theirs) in <index>.
settle() {
    [ -s "$work/unmerged" ] || return 0
    sed -z 's/^[0-7]* \([0-9a-f]*\) [123]\t/0 \1\t/' <"$work/unmerged" >"$work/settled"
    sed -zn "s/^\([0-7]* [0-9a-f]*\) $1\t/\1\t/p" <"$work/unmerged" >>"$work/settled"
    with "$2" g update-index -z --replace --index-info <"$work/settled"
}

for file in "$pack/history/"*.pack; do own unpack-objects -q <"$file"; done
snapshot "$import"
# A new file of theirs may be one that is ignored here: then it is a change of ours, too.
g diff-tree -r -z --no-renames --name-only --diff-filter=A "$tracked" "$theirs_tracked" >"$work/added"
if [ -s "$work/added" ]; then
    present "$work/added" | g update-index -z --add --replace --stdin
    tree=$(g write-tree)
fi
# Which commit a submodule is at is neither brought in nor taken out, so it is no change of ours: to merge it would make conflicts
# that nobody could settle, since the working tree of a submodule stays as it is.
g diff-tree -r --raw -z --no-renames "$import" "$tree" |
    sed -z -n '/^:160000 160000 /{N;s/^:160000 160000 \([0-9a-f]*\) [^\x00]*\x00/160000 \1\t/;p}' >"$work/gitlinks"
if [ -s "$work/gitlinks" ]; then
    g update-index -z --index-info <"$work/gitlinks"
    tree=$(g write-tree)
fi
ours=$tree

# The import with the changes of their tracked files. Only a file that was imported untracked and is tracked by now can be in the way.
merge theirs "$tracked" "$import" "$theirs_tracked"
settle 3 theirs
theirs=$(with theirs own write-tree)

merge merged "$import" "$ours" "$theirs"
sed -z 's/^[^\t]*\t//' <"$work/unmerged" | sort -zu >"$work/conflicts"
conflicts=$(tr -cd '\0' <"$work/conflicts" | wc -c)
if [ -n "$force" ]; then settle 3 merged; else settle 2 merged; fi
merged=$(with merged g write-tree)

# Refuses where a file was written to since the snapshot. Nothing has changed then.
if [ "$merged" != "$ours" ] && ! g read-tree -m -u "$ours" "$merged" 2>"$work/why"; then
    cat "$work/why" >&2
    exit 48
fi
# A conflict that stays is one the next time, too: for it the import stays what it was.
if [ -z "$force" ] && [ "$conflicts" -gt 0 ]; then
    settle 1 theirs
    theirs=$(with theirs own write-tree)
    with tracked g read-tree "$theirs_tracked"
    settle 1 tracked
    theirs_tracked=$(with tracked own write-tree)
fi
export GIT_AUTHOR_NAME=bothy GIT_AUTHOR_EMAIL=bothy@localhost GIT_AUTHOR_DATE='@0 +0000'
export GIT_COMMITTER_NAME=bothy GIT_COMMITTER_EMAIL=bothy@localhost GIT_COMMITTER_DATE='@0 +0000'
commit=$(own commit-tree -p "$base" -m 'the working tree as it was imported, with what came since' "$theirs")
printf 'update %s %s\n' refs/bothy/import "$commit" refs/bothy/tracked "$theirs_tracked" | r update-ref --stdin
echo "changed=$(g diff-tree -r -z --no-renames --name-only --ignore-submodules=all "$ours" "$merged" | tr -cd '\0' | wc -c)"
echo "conflicts=$conflicts"
head -z -n 20 <"$work/conflicts" | tr '\n\0' '?\n' | sed 's/^/conflict=/'
