# read <tmp> <nonce>: the patch or bundle.
exec cat -- "$1/bothy-export-$2/out"
