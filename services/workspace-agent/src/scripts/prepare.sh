# prepare <path> <nonce> <mode> <force>: makes the private directory beside <path> in which the import is built. Prints the
# first directory above <path> that had to be made. An import that is there already may be replaced, if nothing is lost by it
# or <force> is not empty; what would be lost is printed otherwise: commits, files, ignored files, and names of files.
path=$1 nonce=$2 mode=$3 force=$4
if [ "$mode" = sync ]; then
    [ -d "$path/.git" ] && [ ! -L "$path" ] && [ ! -L "$path/.git" ] || exit 50
    r rev-parse -q --verify 'refs/bothy/tracked^{tree}' >/dev/null || exit 51
    # The superuser may write to anything but a file system that is read-only.
    [ -w "$path" ] || exit 47
    rm -rf -- "${path%/*}"/.bothy-import-*
    mkdir -m 700 -- "${path%/*}/.bothy-import-$nonce" "${path%/*}/.bothy-import-$nonce/pack"
    exit 0
fi
[ "$mode" = copy ] || command -v git >/dev/null 2>&1 || exit 40
if [ -L "$path" ]; then exit 41; fi
replace=
if [ -e "$path" ]; then
    [ -d "$path" ] || exit 41
    if [ -n "$(ls -A -- "$path" | head -c 1)" ]; then
        [ -d "$path/.git" ] && [ ! -L "$path/.git" ] && command -v git >/dev/null 2>&1 || exit 42
        export HOME=/nonexistent
        base=$(r rev-parse -q --verify 'refs/bothy/base^{commit}') || exit 42
        import=$(r rev-parse -q --verify 'refs/bothy/import^{commit}') || exit 42
        replace=yes
    fi
fi
parent=${path%/*}
first=
dir=$parent
while [ -n "$dir" ] && [ ! -e "$dir" ] && [ ! -L "$dir" ]; do
    first=$dir
    dir=${dir%/*}
done
[ -d "${dir:-/}" ] || exit 43
undo() {
    status=$?
    [ "$status" -eq 0 ] && return 0
    rm -rf -- "$parent/.bothy-import-$nonce"
    # A failure in here would become the status.
    [ -n "$first" ] || return 0
    dir=$parent
    while rmdir -- "$dir" 2>/dev/null && [ "$dir" != "$first" ]; do dir=${dir%/*}; done
}
trap undo EXIT
if [ -n "$parent" ]; then mkdir -p -- "$parent"; fi
# What an agent that was killed may have left: one import runs at a time.
rm -rf -- "$parent"/.bothy-import-*
work=$parent/.bothy-import-$nonce
mkdir -m 700 -- "$work" "$work/pack"
# A repository that no import knows: all of it would be lost.
whole() {
    printf '%s/\0' "$1" >>"$work/names"
    echo 0 1 0
}
# lost <prefix>: how many commits, changed files and ignored files the repository <prefix> (empty for $path itself, else a
# submodule of it, with a slash at the end) has that are not of the import. Their names are added to $work/names.
lost() (
    path=$path${1:+/${1%/}} top=$work work=$work/lost
    rm -rf -- "$work"
    mkdir -- "$work"
    base=$(r rev-parse -q --verify 'refs/bothy/base^{commit}') &&
        import=$(r rev-parse -q --verify 'refs/bothy/import^{commit}') || {
        work=$top
        whole "${1%/}"
        return
    }
    # What came with the import is known by refs/bothy/; stashes, branches and tags made since are not.
    imported=
    if [ -f "$path/.git/bothy-imported" ]; then imported=$(sed 's/^/^/' "$path/.git/bothy-imported"); fi
    head=$(r rev-parse -q --verify 'HEAD^{commit}' || true)
    commits=$(printf '%s\n' "^$base" "^$import" $head $imported | r rev-list --count --all --stdin)
    borrow "$base"
    snapshot "$(r rev-parse "$import^{tree}")"
    g diff-tree -r --no-renames --name-only --ignore-submodules=all -z "$import" "$tree" >"$work/changed"
    # Repositories inside the repository.
    if [ -s "$work/others" ]; then sed -z -n '/\/$/p' <"$work/others" >>"$work/changed"; fi
    files=$(tr -cd '\0' <"$work/changed" | wc -c)
    ignored=$(g ls-files -z --others --ignored --exclude-standard | tr -cd '\0' | wc -c)
    tr '\n\0' '?\n' <"$work/changed" | head -n 5 | while IFS= read -r name; do printf '%s%s\0' "$1" "$name"; done >>"$top/names"
    echo "$commits $files $ignored"
)
if [ -n "$replace" ]; then
    if [ -z "$force" ]; then
        commits=0 files=0 ignored=0
        : >"$work/names"
        add() {
            told=$("$@")
            set -- $told
            commits=$((commits + $1)) files=$((files + $2)) ignored=$((ignored + $3))
        }
        add lost ''
        if [ -f "$path/.git/bothy-modules" ]; then
            while IFS= read -r line; do
                name=${line#?}
                if [ -d "$path/$name/.git" ] && [ ! -L "$path/$name/.git" ]; then
                    case $line in
                    +*) add lost "$name/" ;;
                    *) add whole "$name" ;;
                    esac
                fi
            done <"$path/.git/bothy-modules"
        fi
        if [ "$commits" -gt 0 ] || [ "$files" -gt 0 ] || [ "$ignored" -gt 0 ]; then
            printf '%s %s %s ' "$commits" "$files" "$ignored"
            tr '\n\0' '?\n' <"$work/names" | head -n 5
            exit 45
        fi
        rm -rf -- "$work/names" "$work/lost"
    fi
    : >"$work/replace"
fi
printf '%s' "$first"
