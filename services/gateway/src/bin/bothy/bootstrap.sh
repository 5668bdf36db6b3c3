# start <path> [<tool> <version>]...: installs them in the background, in a session of its own: it outlives whoever asked for it. Exits
# with 41 where an earlier one is still at work.
# status: prints how that stands, `running`, `broken`, `done` or `failed <tool>...`; nothing where none ever ran.
# Runs under any POSIX sh in the guest; its own text is in BOTHY_BOOTSTRAP.
set -u
umask 077
: "${HOME:=/root}"
state=$HOME/.cache/bothy
has() { command -v "$1" >/dev/null 2>&1; }
boot=$(cat /proc/sys/kernel/random/boot_id)
note() { printf '%s\n' "$*" >"$state/bootstrap.new" && mv "$state/bootstrap.new" "$state/bootstrap.status"; }
standing() {
    [ -f "$state/bootstrap.status" ] || return 0
    read -r word rest <"$state/bootstrap.status"
    case $word in
    # By the boot, too: a process id means nothing in another.
    running) if [ "${rest#* }" = "$boot" ] && kill -0 "${rest%% *}" 2>/dev/null; then echo running; else echo broken; fi ;;
    *) echo "$word $rest" ;;
    esac
}
# By the tool's own way where this machine has it, else by whoever installs tools of all kinds.
install() {
    case $1 in
    rust) if has rustup; then rustup toolchain install "$2"; return; fi ;;
    go)
        # A toolchain has three numbers, the language two.
        case $2 in *.*.*) set -- go "$2" ;; *) set -- go "$2.0" ;; esac
        if has go; then GOTOOLCHAIN="go$2" go version; return; fi
        ;;
    npm) if has npm; then npm install -g "npm@$2"; return; fi ;;
    pnpm | yarn)
        if has corepack; then corepack install -g "$1@$2"; return; fi
        if has npm; then npm install -g "$1@$2"; return; fi
        ;;
    python)
        if has uv; then uv python install "$2"; return; fi
        if has pyenv; then pyenv install -s "$2"; return; fi
        ;;
    node)
        if has fnm; then fnm install "$2"; return; fi
        if has volta; then volta install "node@$2"; return; fi
        ;;
    esac
    if has mise; then mise install -y "$1@$2"; return; fi
    if has asdf; then asdf plugin add "$1" && asdf install "$1" "$2"; return; fi
    echo "nothing in this machine installs $1: put mise (or asdf) into its image"
    return 1
}
case $1 in
status) standing ;;
start)
    [ "$(standing)" != running ] || exit 41
    mkdir -p "$state" && : >"$state/bootstrap.log" || exit 1
    shift
    note starting
    setsid sh -c "$BOTHY_BOOTSTRAP" bothy-bootstrap work "$@" </dev/null >>"$state/bootstrap.log" 2>&1 &
    note running "$! $boot"
    ;;
work)
    # Not before it is written down who this is; and not at all, if whoever should have done that is gone.
    tries=0
    until [ "$(standing)" = running ]; do
        [ "$tries" -lt 100 ] || exit 1
        tries=$((tries + 1))
        sleep 0.1 || sleep 1
    done
    cd "$2" || exit 1
    shift 2
    failed=
    while [ $# -ge 2 ]; do
        echo "== $1 $2"
        install "$1" "$2" || { echo "== $1 failed"; failed="$failed $1"; }
        shift 2
    done
    if [ -n "$failed" ]; then note "failed$failed"; else note done; fi
    ;;
esac
