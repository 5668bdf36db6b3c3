# clean-export <tmp> <nonce>
rm -rf -- "$1/bothy-export-$2"
