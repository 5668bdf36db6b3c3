# import <path> <nonce> <head> <format> <branch> <name> <email> <mode> <readonly>: builds the repository from the pack beside
# <path> and renames it into place. <branch>, <name>, <email> and <readonly> may be empty.
path=$1 nonce=$2 head=$3 format=$4 branch=$5 name=$6 email=$7 mode=$8 readonly=$9
work=${path%/*}/.bothy-import-$nonce
pack=$work/pack
export HOME="$work"
# A tar stream that ends between two entries looks whole to tar.
[ -f "$pack/end" ] || exit 44

# rename(2) replaces an empty directory and nothing else.
place() {
    cd /
    if [ -e "$work/replace" ]; then
        # One that was read-only is mounted on itself.
        while umount -- "$path" 2>/dev/null; do :; done
        mv -T -- "$path" "$work/old"
        if ! mv -T -- "$work/repo" "$path"; then
            mv -T -- "$work/old" "$path"
            exit 1
        fi
    else
        mv -T -- "$work/repo" "$path"
    fi
    [ -n "$readonly" ] || return 0
    if ! { mount --bind -- "$path" "$path" && mount -o remount,bind,ro -- "$path"; }; then
        while umount -- "$path" 2>/dev/null; do :; done
        mv -T -- "$path" "$work/repo"
        if [ -e "$work/replace" ]; then mv -T -- "$work/old" "$path"; fi
        exit 46
    fi
}

if [ "$mode" = copy ]; then
    mkdir -p -- "$pack/files"
    chmod 755 "$pack/files"
    mv -T -- "$pack/files" "$work/repo"
    place
    exit 0
fi
export GIT_AUTHOR_NAME=bothy GIT_AUTHOR_EMAIL=bothy@localhost GIT_AUTHOR_DATE='@0 +0000'
export GIT_COMMITTER_NAME=bothy GIT_COMMITTER_EMAIL=bothy@localhost GIT_COMMITTER_DATE='@0 +0000'

# On all processors: most of the time goes here.
write_tree() { g -c checkout.workers=0 read-tree --reset -u "$1"; }

# build <repo> <pack> <head> <format> <branch> <name> <email>: a repository from its part of the pack.
build() (
    repo=$1 pack=$2 head=$3 format=$4 branch=$5 name=$6 email=$7
    git init -q --template= --object-format="$format" "$repo"
    cd "$repo"
    mkdir -p .git/info .git/hooks
    # With indexes made by the host: to index a pack is to read all of it, and slow where the processor is emulated.
    mkdir -p .git/objects/pack
    chmod 444 "$pack/history/"*
    mv -- "$pack/history/"* .git/objects/pack/
    if [ -f "$pack/shallow" ]; then
        # The boundary of other branches is not here, and must not be named.
        g cat-file --batch-check='%(objectname) %(objecttype)' <"$pack/shallow" | sed -n 's/ commit$//p' >.git/shallow
    fi
    g cat-file -e "$head^{commit}"
    if [ -f "$pack/refs" ]; then
        g update-ref --stdin <"$pack/refs"
        sed 's/.* //' <"$pack/refs" >.git/bothy-imported
    fi
    if [ -n "$branch" ]; then
        g check-ref-format "refs/heads/$branch"
        g update-ref "refs/heads/$branch" "$head"
        g symbolic-ref HEAD "refs/heads/$branch"
    else
        g update-ref --no-deref HEAD "$head"
    fi
    g update-ref refs/bothy/base "$head"

    # The working tree as it was, first as a tree: git then writes the files, so no attribute of a file can come out wrong.
    if [ -s "$pack/tracked.patch" ] || [ -s "$pack/staged.patch" ]; then
        export GIT_INDEX_FILE="$pack/index"
        g read-tree "$head"
        if [ -s "$pack/tracked.patch" ]; then g apply --cached --whitespace=nowarn --allow-empty "$pack/tracked.patch"; fi
        tree=$(g write-tree)
        unset GIT_INDEX_FILE
        write_tree "$tree"
        # The index as it was: unchanged files keep what git knows of them, so that the first `git status` reads no content.
        g read-tree -m "$head"
        if [ -s "$pack/staged.patch" ]; then g apply --cached --whitespace=nowarn --allow-empty "$pack/staged.patch"; fi
        g update-index -q --refresh >/dev/null || true
    else
        tree=$(g rev-parse "$head^{tree}")
        write_tree "$head"
        # Only for files that are added to it.
        if [ -d "$pack/untracked" ]; then cp -- .git/index "$pack/index"; fi
    fi
    tracked=$tree

    export GIT_INDEX_FILE="$pack/index"
    if [ -d "$pack/untracked" ]; then
        cp -R -P -p -- "$pack/untracked/." .
        chmod 755 .
        # Ignored ones, too: whatever came is a part of what later changes are seen against.
        (cd "$pack/untracked" && find . ! -type d -print0) | sed -z 's|^\./||' | g update-index -z --add --replace --stdin
        tree=$(g write-tree)
    fi
    unset GIT_INDEX_FILE
    import=$(g commit-tree -p "$head" -m 'the working tree as it was imported' "$tree")
    g update-ref refs/bothy/import "$import"
    # The same without what is not tracked: that of the host can be compared with it.
    g update-ref refs/bothy/tracked "$tracked"
    if [ -n "$name" ]; then g config user.name "$name"; fi
    if [ -n "$email" ]; then g config user.email "$email"; fi
)

build "$work/repo" "$pack" "$head" "$format" "$branch" "$name" "$email"
cd "$work/repo"
# Other submodules of the repository <prefix> (empty, or with a slash at the end) came empty: what is put there can be told of, but
# is never taken out.
note_empty() {
    [ -f "./$1.gitmodules" ] || return 0
    (cd "./$1" && g ls-files -s -z) | sed -z -n 's/^160000 [^\t]*\t//p' | tr '\n\0' '?\n' | while IFS= read -r name; do
        [ -e "$1$name/.git" ] || printf -- '-%s\n' "$1$name" >>.git/bothy-modules
    done
}

# Submodules, those above before those within: each a repository of its own, whose git directory is inside it.
n=1
while [ -f "$pack/modules/$n/module" ]; do
    { IFS= read -r module && read -r head && read -r format && IFS= read -r branch && IFS= read -r name && IFS= read -r email; } \
        <"$pack/modules/$n/module"
    build "$work/repo/$module" "$pack/modules/$n" "$head" "$format" "$branch" "$name" "$email"
    # To git it is one that is set up, but without the address that it came from.
    above=./$module
    above=${above%/*}
    while [ ! -e "$above/.git" ]; do above=${above%/*}; done
    within=./$module
    (cd "$above" && g config --add submodule.active ":(literal)${within#"$above/"}")
    printf '+%s\n' "$module" >>.git/bothy-modules
    n=$((n + 1))
done
note_empty ''
if [ "$n" -gt 1 ]; then
    sed 's/^.//' .git/bothy-modules >"$work/modules"
    while IFS= read -r module; do
        if [ -e "$module/.git" ]; then note_empty "$module/"; fi
    done <"$work/modules"
fi

place
