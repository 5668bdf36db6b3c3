# Put in front of every script. Runs under any POSIX sh in the guest. Exit statuses 40 to 59 have a meaning of their own,
# see script.rs; everything else is a failure with its reason on stderr.
set -eu
umask 022
export LC_ALL=C
# The repository's configuration may be anybody's work: no variables, no global and no system configuration.
for name in $(env | sed -n 's/^\(GIT_[A-Za-z0-9_]*\)=.*/\1/p'); do unset "$name"; done
export GIT_CONFIG_NOSYSTEM=1 GIT_CONFIG_SYSTEM=/dev/null GIT_CONFIG_GLOBAL=/dev/null
export GIT_ATTR_NOSYSTEM=1 GIT_TERMINAL_PROMPT=0 GIT_OPTIONAL_LOCKS=0 GIT_NO_LAZY_FETCH=1 GIT_NO_REPLACE_OBJECTS=1
export GIT_LITERAL_PATHSPECS=1 GIT_PAGER=cat GIT_EDITOR=: GIT_ALLOW_PROTOCOL=none
unset XDG_CONFIG_HOME CDPATH || true

g() {
    git -c core.hooksPath=/dev/null -c core.fsmonitor=false -c core.untrackedCache=false -c core.splitIndex=false \
        -c core.autocrlf=false -c core.safecrlf=false -c core.attributesFile=/dev/null -c core.excludesFile=/dev/null \
        -c gc.auto=0 -c maintenance.auto=false -c submodule.recurse=false -c core.quotePath=true \
        -c safe.directory='*' -c index.sparse=false "$@"
}

# Adds to the index all files that git does not know and does not ignore. Repositories inside the repository, which are
# listed with a slash at the end, stay out.
add_others() {
    g ls-files -z --others --exclude-standard >"$work/others"
    sed -z '/\/$/d' <"$work/others" | g update-index -z --add --replace --stdin
}
