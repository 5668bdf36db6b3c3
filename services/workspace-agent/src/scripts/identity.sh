# identity <home> <name> <email>: sets the git identity in a configuration that is there already. Either may be empty.
home=$1 name=$2 email=$3
command -v git >/dev/null 2>&1 || exit 40
# A machine that was killed may keep git's lock of then for ever: one from before this boot is nobody's.
lock=$home/.gitconfig.lock
if [ -e "$lock" ] && [ "$(stat -c %Y "$lock")" -lt $(($(date +%s) - $(cut -d. -f1 /proc/uptime))) ]; then rm -f "$lock"; fi
if [ -n "$name" ]; then g config --file "$home/.gitconfig" user.name "$name"; fi
if [ -n "$email" ]; then g config --file "$home/.gitconfig" user.email "$email"; fi
