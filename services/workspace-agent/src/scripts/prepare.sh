# prepare <path> <nonce>: makes the private directory beside <path> in which the import is built. Prints the first
# directory above <path> that had to be made.
path=$1 nonce=$2
command -v git >/dev/null 2>&1 || exit 40
if [ -L "$path" ]; then exit 41; fi
if [ -e "$path" ]; then
    [ -d "$path" ] || exit 41
    [ -z "$(ls -A -- "$path" | head -c 1)" ] || exit 42
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
    [ "$status" -eq 0 ] && return
    rm -rf -- "$parent/.bothy-import-$nonce"
    [ -n "$first" ] || return
    dir=$parent
    while rmdir -- "$dir" 2>/dev/null && [ "$dir" != "$first" ]; do dir=${dir%/*}; done
}
trap undo EXIT
if [ -n "$parent" ]; then mkdir -p -- "$parent"; fi
# What an agent that was killed may have left: one import runs at a time.
rm -rf -- "$parent"/.bothy-import-*
work=$parent/.bothy-import-$nonce
mkdir -m 700 -- "$work" "$work/pack"
printf '%s' "$first"
