# clean <path> <nonce> <first>: takes away what prepare made; <first> only where the import failed.
path=$1 nonce=$2 first=$3
parent=${path%/*}
rm -rf -- "$parent/.bothy-import-$nonce"
if [ -n "$first" ]; then
    dir=$parent
    while rmdir -- "$dir" 2>/dev/null && [ "$dir" != "$first" ]; do dir=${dir%/*}; done
fi
