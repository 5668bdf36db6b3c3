# identity <home> <name> <email>: sets the git identity in a configuration that is there already. Either may be empty.
home=$1 name=$2 email=$3
command -v git >/dev/null 2>&1 || exit 40
# A machine that was killed may keep git's lock of then for ever: one from before this boot is nobody's.
lock=$home/.gitconfig.lock
at=$(stat -c %Y "$lock" 2>/dev/null || true)
if [ -n "$at" ] && [ "$at" -lt $(($(date +%s) - $(cut -d. -f1 /proc/uptime))) ]; then rm -f "$lock"; fi
# Another's is waited for: after a crash of the host's agents the same request may be here twice.
put() {
    tries=0
    until said=$(g config --file "$home/.gitconfig" "$1" "$2" 2>&1); do
        tries=$((tries + 1))
        if [ "$tries" -ge 8 ]; then
            echo "$said" >&2
            exit 1
        fi
        sleep 1
    done
}
if [ -n "$name" ]; then put user.name "$name"; fi
if [ -n "$email" ]; then put user.email "$email"; fi
