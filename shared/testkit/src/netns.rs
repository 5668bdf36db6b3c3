//! Private network namespaces. One is held by a file descriptor alone: no name under `/run/netns`, no process, so that
//! nothing is left when the test is killed. Namespaces belong to threads (setns(2)), hence each entry is a new thread.

use nix::sched::{CloneFlags, setns, unshare};
use rtnetlink::LinkUnspec;
use std::{
    fs::File,
    future::Future,
    io,
    os::fd::{AsFd, BorrowedFd},
    process::{Child, Command},
    thread,
};

/// A network namespace with nothing in it but `lo`, up. It goes when this value and all processes and sockets in it are
/// gone.
#[derive(Debug)]
pub struct Netns(File);

impl Netns {
    /// A new namespace. Needs root: see [`require_root!`](crate::require_root).
    ///
    /// # Panics
    /// Where the process may not make one.
    #[expect(clippy::new_without_default, reason = "makes a kernel object")]
    pub fn new() -> Self {
        let made = thread::scope(|s| {
            s.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET)?;
                #[expect(clippy::disallowed_methods, reason = "a fixed path")]
                File::open("/proc/thread-self/ns/net")
            })
            .join()
            .expect("the thread that unshares")
        });
        let ns = Self(made.expect("a network namespace; root can make one"));
        ns.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection().expect("a netlink socket");
            tokio::spawn(connection);
            // `lo` is always the first link of a namespace.
            let up = LinkUnspec::new_with_index(1).up().build();
            handle.link().set(up).execute().await.expect("lo up");
        });
        ns
    }

    /// Runs `f` on a new thread inside the namespace. Threads that `f` starts are inside, too.
    ///
    /// # Panics
    /// Where `f` does, with the same payload.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        let test = thread::current().name().unwrap_or("netns").to_owned();
        let done = thread::scope(|s| {
            let inside = || {
                setns(&self.0, CloneFlags::CLONE_NEWNET).expect("enter the namespace");
                f()
            };
            thread::Builder::new().name(test).spawn_scoped(s, inside).expect("a thread").join()
        });
        done.unwrap_or_else(|payload| std::panic::resume_unwind(payload))
    }

    /// Runs `future` on a multi-threaded tokio runtime of its own, all of whose threads are inside the namespace.
    pub fn block_on<F: Future<Output: Send> + Send>(&self, future: F) -> F::Output {
        self.run(|| {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
            runtime.expect("a runtime").block_on(future)
        })
    }

    /// Starts `command` inside the namespace. The thread that starts it ends at once, so a child that asks for a signal
    /// at its parent's death (PR_SET_PDEATHSIG, which means the parent *thread*) gets it at once, too.
    pub fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        self.run(|| command.spawn())
    }

    /// The same for a tokio command; call it within a runtime. The child belongs to that runtime.
    pub fn spawn_tokio(&self, command: &mut tokio::process::Command) -> io::Result<tokio::process::Child> {
        let runtime = tokio::runtime::Handle::current();
        self.run(|| {
            let _inside = runtime.enter();
            command.spawn()
        })
    }

    /// The descriptor, to move links into the namespace.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn a_namespace_is_apart_and_its_children_are_inside() {
        crate::require_root!();
        let ns = Netns::new();
        let port = ns.run(crate::free_port);
        let outer = TcpListener::bind(("127.0.0.1", port));
        ns.run(|| TcpListener::bind(("127.0.0.1", port)).unwrap());
        drop(outer);

        let links = |out: std::process::Output| {
            String::from_utf8(out.stdout).unwrap().lines().filter(|l| l.contains(':')).count()
        };
        let mut cat = Command::new("cat");
        cat.arg("/proc/self/net/dev").stdout(std::process::Stdio::piped());
        let inside = ns.spawn(&mut cat).unwrap().wait_with_output().unwrap();
        assert_eq!(links(inside), 1, "nothing but lo");

        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let status = runtime.block_on(async {
            let mut grep = tokio::process::Command::new("grep");
            grep.args(["-qE", "^ *(eth|en|wl|docker)", "/proc/self/net/dev"]);
            ns.spawn_tokio(&mut grep).unwrap().wait().await.unwrap()
        });
        assert_eq!(status.code(), Some(1), "no link of the host");
    }
}
