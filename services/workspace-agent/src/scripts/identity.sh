# identity <home> <name> <email>: sets the git identity in a configuration that is there already. Either may be empty.
home=$1 name=$2 email=$3
command -v git >/dev/null 2>&1 || exit 40
if [ -n "$name" ]; then g config --file "$home/.gitconfig" user.name "$name"; fi
if [ -n "$email" ]; then g config --file "$home/.gitconfig" user.email "$email"; fi
