# Put in front of every script. Runs under any POSIX sh in the guest. Exit statuses 40 to 59 have a meaning of their own,
# see script.rs; everything else is a failure with its reason on stderr.
set -eu
umask 022
export LC_ALL=C
# To start a process takes a tenth of a second where the processor is emulated: what the shell can do itself, it does.
# The repository's configuration may be anybody's work: no variables, no global and no system configuration.
case $(export -p) in
*GIT_*) for name in $(env | sed -n 's/^\(GIT_[A-Za-z0-9_]*\)=.*/\1/p'); do unset "$name"; done ;;
esac
export GIT_CONFIG_NOSYSTEM=1 GIT_CONFIG_SYSTEM=/dev/null GIT_CONFIG_GLOBAL=/dev/null
export GIT_ATTR_NOSYSTEM=1 GIT_TERMINAL_PROMPT=0 GIT_OPTIONAL_LOCKS=0 GIT_NO_LAZY_FETCH=1 GIT_NO_REPLACE_OBJECTS=1
export GIT_LITERAL_PATHSPECS=1 GIT_PAGER=cat GIT_EDITOR=: GIT_ALLOW_PROTOCOL=none
unset XDG_CONFIG_HOME CDPATH || true

g() {
    git -c core.hooksPath=/dev/null -c core.fsmonitor=false -c core.untrackedCache=false -c core.splitIndex=false \
        -c core.autocrlf=false -c core.safecrlf=false -c core.attributesFile=/dev/null -c core.excludesFile=/dev/null \
        -c gc.auto=0 -c maintenance.auto=false -c submodule.recurse=false -c core.quotePath=true \
        -c safe.directory='*' -c index.sparse=false "$@"
}

# Adds to the index all files that git does not know and does not ignore. Repositories inside the repository, which are
# listed with a slash at the end, stay out.
add_others() {
    g ls-files -z --others --exclude-standard >"$work/others"
    [ -s "$work/others" ] || return 0
    sed -z '/\/$/d' <"$work/others" | g update-index -z --add --replace --stdin
}

# The repository itself, only to be read.
r() { g --git-dir="$path/.git" "$@"; }

# A git directory of our own in $work borrows the objects of the repository $path, so that its configuration, hooks and
# filters are never read, and new objects, the index and locks stay out of it. `g` then works with it, and the commit <head> is
# its HEAD; that also says which kind of ids objects have.
borrow() {
    mkdir -p "$work/git/objects/info" "$work/git/refs" "$work/git/info"
    printf '%s\n' "$1" >"$work/git/HEAD"
    if [ "${#1}" -eq 64 ]; then
        printf '[core]\n\trepositoryformatversion = 1\n\tbare = true\n[extensions]\n\tobjectformat = sha256\n' >"$work/git/config"
    else
        printf '[core]\n\trepositoryformatversion = 0\n\tbare = true\n' >"$work/git/config"
    fi
    printf '%s\n' "$path/.git/objects" >"$work/git/objects/info/alternates"
    if [ -f "$path/.git/info/exclude" ]; then cp -- "$path/.git/info/exclude" "$work/git/info/exclude"; fi
    export GIT_DIR="$work/git" GIT_WORK_TREE="$path" GIT_INDEX_FILE="$work/index"
    cd "$path"
    # With its time: git tells by it which entries it cannot trust.
    if [ -f .git/index ]; then cp -p -- .git/index "$work/index"; fi
}

# Those of the names in file <list> that the index does not have and that are files of the working tree, whether git ignores them or
# not: none that leads through a symbolic link.
present() {
    sort -z <"$1" >"$1.sorted"
    g ls-files -z --others | sort -z | comm -z -12 "$1.sorted" -
}

# The working tree as it is now, as a tree: $tree. <imported> is the tree of the import.
snapshot() {
    if ! g add -u . 2>"$work/why"; then
        # An index that cannot be read or stands on its own no longer: start from the import and read every file.
        rm -f -- "$work/index" "$work/index.lock"
        g read-tree "$1"
        g add -u .
    fi
    add_others
    tree=$(g write-tree)
    [ "$tree" != "$1" ] || return 0
    # Imported files that are ignored by now, or were dropped from the index only, are there still.
    g diff-index --cached --no-renames --name-only -z --diff-filter=D "$1" >"$work/gone"
    [ -s "$work/gone" ] || return 0
    present "$work/gone" | g update-index -z --add --replace --stdin
    tree=$(g write-tree)
}
