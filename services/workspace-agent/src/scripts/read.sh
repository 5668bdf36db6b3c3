# read <tmp> <nonce>: the patch.
exec cat -- "$1/bothy-export-$2/patch"
