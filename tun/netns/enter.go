package netns

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Namespace is a network namespace that another program has made. While it is open the namespace exists.
type Namespace struct {
	net  *os.File
	user *os.File // the user namespace that owns it; nil: the caller's own
	mnt  *os.File // the mount namespace that belongs to it; nil: the caller's own is good enough
	id   ID
}

// ID distinguishes a network namespace from all others that exist at the same time.
type ID struct{ Dev, Ino uint64 }

// OpenNamespace opens a network namespace by a path below /proc/PID/ns, or of a file on which it is mounted.
func OpenNamespace(path string) (*Namespace, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	n := &Namespace{net: os.NewFile(uintptr(fd), path)}
	if err := n.identify(); err != nil {
		n.Close()
		return nil, err
	}
	return n, nil
}

// openProgram opens the namespaces of a child that Spawn has made. Without root its mount namespace is one of them: the program
// could trace a process of ours that starts in its user namespace, and such a process must not see more files than the program.
func openProgram(pid int) (*Namespace, error) {
	dir := "/proc/" + strconv.Itoa(pid) + "/ns/"
	n, err := OpenNamespace(dir + "net")
	if err != nil || n.user == nil {
		return n, err
	}
	if n.mnt, err = os.Open(dir + "mnt"); err != nil {
		n.Close()
		return nil, err
	}
	return n, nil
}

// identify finds out what was opened.
func (n *Namespace) identify() error {
	fd := int(n.net.Fd())
	if kind, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE); err != nil || kind != unix.CLONE_NEWNET {
		return errors.New("it is no network namespace")
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	n.id = ID{st.Dev, st.Ino}
	user, err := unix.IoctlRetInt(fd, unix.NS_GET_USERNS)
	if err != nil {
		return nil // EPERM: it is not below the caller's; entering will fail if the caller may not
	}
	n.user = os.NewFile(uintptr(user), "user namespace")
	var own unix.Stat_t
	if err := unix.Stat("/proc/self/ns/user", &own); err != nil {
		return err
	}
	if err := unix.Fstat(user, &st); err != nil {
		return err
	}
	if st.Dev == own.Dev && st.Ino == own.Ino {
		n.user.Close()
		n.user = nil
	}
	return nil
}

// ID returns what identifies the namespace.
func (n *Namespace) ID() ID { return n.id }

// OfCaller reports whether the calling thread is in the namespace.
func (n *Namespace) OfCaller() bool {
	var st unix.Stat_t
	return unix.Stat("/proc/thread-self/ns/net", &st) == nil && n.id == ID{st.Dev, st.Ino}
}

// Owner returns the id of the user who made the user namespace that owns this namespace, or -1 if the caller may not know it.
// Containers that root has made belong to user 0, whatever users run in them; rootless containers belong to their user.
func (n *Namespace) Owner() int {
	user, err := unix.IoctlRetInt(int(n.net.Fd()), unix.NS_GET_USERNS)
	if err != nil {
		return -1
	}
	defer unix.Close(user)
	var uid uint32
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(user), unix.NS_GET_OWNER_UID, uintptr(unsafe.Pointer(&uid)))
	if errno != 0 {
		return -1
	}
	return int(uid)
}

// Close lets the namespace end if nobody else uses it. It may be called twice.
func (n *Namespace) Close() {
	for _, f := range []*os.File{n.net, n.user, n.mnt} {
		_ = f.Close() // of nil, it is an error and nothing else
	}
}

// Start starts this program with other arguments in the namespace. Only the network namespace is another one, and the
// user namespace that owns it where the caller has no rights in it otherwise: files and processes are the caller's. Of what
// openProgram has opened, the mount namespace is another one as well.
// files are the new process's descriptors, beginning with standard input. The caller must wait for the process.
//
// The new process has its own session, so that signals of the terminal do not reach it.
func (n *Namespace) Start(args []string, env []string, files []*os.File) (*os.Process, error) {
	attr := &os.ProcAttr{Dir: "/", Env: env, Files: files, Sys: &syscall.SysProcAttr{Setsid: true}}
	if n.user != nil && !isRoot() {
		return n.startByNsenter(args, attr)
	}
	type result struct {
		p   *os.Process
		err error
	}
	done := make(chan result)
	go func() {
		runtime.LockOSThread()
		p, back, err := n.startHere(args, attr)
		if back {
			runtime.UnlockOSThread() // otherwise the thread ends with the goroutine
		}
		done <- result{p, err}
	}()
	r := <-done
	return r.p, r.err
}

// startHere moves the calling thread into the namespace and starts the program from it, because a process begins in the
// namespaces of the thread that starts it. back: the thread is in its former namespace again.
func (n *Namespace) startHere(args []string, attr *os.ProcAttr) (p *os.Process, back bool, err error) {
	former, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, true, err
	}
	defer former.Close()
	if err := unix.Setns(int(n.net.Fd()), unix.CLONE_NEWNET); err != nil {
		return nil, true, fmt.Errorf("cannot enter the network namespace: %w%s", err, enterHint(err))
	}
	p, err = os.StartProcess("/proc/self/exe", append([]string{"viasocks"}, args...), attr)
	back = unix.Setns(int(former.Fd()), unix.CLONE_NEWNET) == nil
	return p, back, err
}

func enterHint(err error) string {
	if errors.Is(err, unix.EPERM) {
		return ": CAP_SYS_ADMIN is needed: run it as root, or as the user whose container it is"
	}
	return ""
}

// startByNsenter starts the program by nsenter(1), because a process with several threads, such as each Go program,
// cannot enter a user namespace (setns(2)). The descriptors of the namespaces and of the executable follow those in
// files.
func (n *Namespace) startByNsenter(args []string, attr *os.ProcAttr) (*os.Process, error) {
	nsenter, err := exec.LookPath("nsenter")
	if err != nil {
		return nil, errors.New("cannot enter the user namespace: nsenter is not installed: install util-linux")
	}
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		return nil, err
	}
	defer self.Close()
	at := func(f *os.File) string {
		attr.Files = append(attr.Files, f)
		return "/proc/self/fd/" + strconv.Itoa(len(attr.Files)-1)
	}
	argv := []string{"nsenter", "--user=" + at(n.user), "--net=" + at(n.net), "--preserve-credentials"}
	if n.mnt != nil {
		argv = append(argv, "--mount="+at(n.mnt))
	}
	return os.StartProcess(nsenter, append(append(argv, "--", at(self)), args...), attr)
}

// Users tells whether a network namespace is in use: whether a process other than ours is in it, or a file on which it
// is mounted. What only a descriptor or a socket of another process keeps alive is not seen.
type Users struct {
	id     ID
	ours   map[int]bool // process ids that do not count
	last   string       // the process or file that was seen last, by its path; it is looked at first
	proc   string       // /proc, except in tests
	mounts string       // file of the mounts
	named  string       // namedDir, except in tests
}

// NewUsers returns Users for the namespace id. The processes ours do not count.
func NewUsers(id ID, ours ...int) *Users {
	u := &Users{id: id, ours: map[int]bool{}, proc: "/proc", mounts: "/proc/self/mountinfo", named: namedDir}
	for _, pid := range ours {
		u.ours[pid] = true
	}
	return u
}

// Any reports whether somebody uses the namespace. It costs one system call as long as the user that was seen last is
// still there, and otherwise one for each process.
func (u *Users) Any() bool {
	if u.last != "" && u.isAt(u.last) {
		return true
	}
	u.last = ""
	list, _ := filepath.Glob(filepath.Join(u.proc, "[0-9]*"))
	for _, dir := range list {
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil || u.ours[pid] {
			continue
		}
		if path := filepath.Join(dir, "ns/net"); u.isAt(path) {
			u.last = path
			return true
		}
	}
	for _, path := range mountsOf(u.mounts, u.id.Ino) {
		if u.isAt(path) {
			u.last = path
			return true
		}
	}
	return false
}

// Seen returns the path below /proc/PID, or the file, by which Any saw that the namespace is in use.
func (u *Users) Seen() string { return u.last }

// Name returns the name by which ip-netns(8) knows the namespace, or "".
func (u *Users) Name() string {
	for _, path := range mountsOf(u.mounts, u.id.Ino) {
		if filepath.Dir(path) == u.named && u.isAt(path) {
			return filepath.Base(path)
		}
	}
	return ""
}

func (u *Users) isAt(path string) bool {
	var st unix.Stat_t
	return unix.Stat(path, &st) == nil && u.id == ID{st.Dev, st.Ino}
}
