package netns

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// setupTimeout limits Spawn in addition to its context. The helper makes about a dozen system calls.
const setupTimeout = 30 * time.Second

// Spec describes a program and the network that it will see.
type Spec struct {
	Argv        []string       // Argv[0] is looked up in the PATH of Env, as a shell does
	Env         []string       // nil: the caller's
	Dir         string         // working directory; "": the caller's
	Stdin       *os.File       // nil: the caller's; the same for the next two
	Stdout      *os.File       //
	Stderr      *os.File       //
	TUN         TUNOptions     // Persist has no use here
	Addrs       []netip.Prefix // of the TUN, which is the default route of their families
	Gateway     netip.Addr     // a gateway for programs that ask the default route for one; invalid: none
	Nameserver  []netip.Addr   // for the program's /etc/resolv.conf; none: the file stays as it is
	Search      []string       // domains for the same file, instead of those in it; nil: those stay
	DotsAsIs    bool           // a name with a dot is first looked up as it is, whatever "ndots" the same file has
	Host        HostEntry      // a name for the program's /etc/hosts
	Local       []netip.Prefix // addresses for lo, as sources of connections from outside
	Sockets     bool           // Child.Sockets is wanted
	User        *User          // nil: the caller; otherwise the caller must be root
	Named       string         // a named network namespace, which is left as it was; "": a new one
	FollowStops bool           // Wait stops the calling process when the program stops itself
	Log         *slog.Logger   // tells when a process of ours ends unexpectedly; nil: nothing does
}

// Child is a program in its own namespaces. Its life is: Spawn (the namespaces exist, and a helper process waits
// inside), Exec (the helper becomes the program, with the same pid), Wait, Close.
type Child struct {
	TUN      []*os.File // its queues, for tun.FromFiles, which takes ownership; otherwise Close closes them
	TUNName  string
	TUNIndex int
	IPv6     bool     // the TUN has all its IPv6 addresses; false if there are none or the namespace has no IPv6
	Diag     *Diag    // of the program's namespace, after SetInterface; nil if DiagErr is set; Close closes it
	DiagErr  error    // why sockets cannot be queried
	Sockets  *Sockets // if Spec.Sockets; Close closes it
	Rootless bool     // the program is in a user namespace, without capabilities

	follow bool
	keeper *keeper       // of a named namespace; nil: there is none
	conn   *net.UnixConn // to the helper; EOF when it has become the program or has died
	pid    int

	mu      sync.Mutex
	pidfd   int // -1: none
	started bool
	failed  *report // why the program could not be run
	reaped  bool
	status  syscall.WaitStatus // once it is reaped
}

// Spawn starts a helper in new network and mount namespaces, and also in a new user namespace unless the caller is
// root with CAP_SYS_ADMIN and CAP_NET_ADMIN. The helper brings lo up, makes the TUN with its addresses and default
// routes, mounts a resolv.conf over the program's and empty directories over the host's resolver sockets, mounts a
// sysfs of the new namespace where it is allowed to, and passes the TUN and a sock_diag socket to the caller. Then
// Spawn returns; the program does not run yet. If the caller dies, the TUN disappears and the namespace reaches
// nothing.
//
// The helper is /proc/self/exe: main must begin with MainIfChild. Mounts of the host appear inside, and no mount gets
// out. The program stays in the caller's process group and session, so signals of the terminal reach both. The caller
// must handle SIGINT and SIGQUIT with signal.Notify (not signal.Ignore, which the program would inherit). File
// descriptors that the caller inherited are passed on; others are not.
//
// ctx limits the wait for the helper, not the program. An error is one line that ends with what to do.
func Spawn(ctx context.Context, s Spec) (*Child, error) {
	if len(s.Argv) == 0 || s.Argv[0] == "" {
		return nil, errors.New("cannot run a program: no command given")
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot run a program: %w", err)
	}
	ours := os.NewFile(uintptr(pair[0]), "helper")
	fc, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		unix.Close(pair[1])
		return nil, fmt.Errorf("cannot run a program: %w", err)
	}
	c := &Child{conn: fc.(*net.UnixConn), pidfd: -1, follow: s.FollowStops, Rootless: !isRoot()}
	if err = c.enter(s); err == nil {
		err = c.start(s, pair[1])
	}
	unix.Close(pair[1])
	c.keeper.tend()
	if err != nil {
		c.conn.Close()
		c.keeper.Close()
		return nil, err
	}
	if err := c.handover(ctx, s); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// enter prepares what only root may do.
func (c *Child) enter(s Spec) error {
	switch {
	case c.Rootless && s.Named != "":
		return fmt.Errorf("cannot use the network namespace %q: only root can enter it", s.Named)
	case c.Rootless && s.User != nil:
		return fmt.Errorf("cannot run a program as user %d: only root can", s.User.UID)
	case s.Named == "":
		return nil
	}
	ns, err := openNamed(s.Named)
	if err != nil {
		return err
	}
	c.keeper, err = startKeeper(ns, s.Named, s.Local, s.Log)
	return err
}

// start starts the helper with its end of the socket pair.
func (c *Child) start(s Spec, sock int) error {
	var files []uintptr
	for _, f := range []struct{ given, own *os.File }{{s.Stdin, os.Stdin}, {s.Stdout, os.Stdout}, {s.Stderr, os.Stderr}} {
		if f.given == nil {
			f.given = f.own
		}
		files = append(files, f.given.Fd())
	}
	// The program may expect descriptors that we were started with. The helper's socket gets the first number that is
	// unused.
	for {
		flags, err := unix.FcntlInt(uintptr(len(files)), unix.F_GETFD, 0)
		if err != nil || flags&unix.FD_CLOEXEC != 0 {
			break
		}
		files = append(files, uintptr(len(files)))
	}
	argv := []string{helperName, strconv.Itoa(len(files))}
	files = append(files, uintptr(sock))
	var ns *os.File
	if c.keeper != nil {
		files, ns = append(files, c.keeper.sock.Fd()), c.keeper.ns
	}
	sys := &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, PidFD: &c.pidfd}
	if c.Rootless {
		sys.Cloneflags |= unix.CLONE_NEWUSER
		sys.UidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getuid(), HostID: os.Getuid(), Size: 1}}
		sys.GidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getgid(), HostID: os.Getgid(), Size: 1}}
		// With an identity map, exec drops all capabilities except the ambient ones.
		sys.AmbientCaps = []uintptr{unix.CAP_NET_ADMIN, unix.CAP_NET_RAW, unix.CAP_SYS_ADMIN}
	}
	env := append(ownEnv(), "GODEBUG="+os.Getenv("GODEBUG"))
	if ns != nil {
		sys.Cloneflags &^= unix.CLONE_NEWNET
	}
	err := within(ns, func() (err error) {
		c.pid, _, err = syscall.StartProcess("/proc/self/exe", argv, &syscall.ProcAttr{Env: env, Files: files, Sys: sys})
		return err
	})
	runtime.KeepAlive(s)
	if err != nil {
		return startError(c.Rootless, err)
	}
	return nil
}

// handover sends the helper its order and receives what it made.
func (c *Child) handover(ctx context.Context, s Spec) error {
	c.conn.SetDeadline(time.Now().Add(setupTimeout))
	stop := context.AfterFunc(ctx, func() { c.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	msg, err := json.Marshal(c.order(s))
	if err != nil {
		return fmt.Errorf("cannot run a program: %w", err)
	}
	_, werr := c.conn.Write(frame(msg))
	r, files, rerr := readReport(c.conn)
	defer func() {
		for _, f := range files {
			f.Close()
		}
		if r.Maker != 0 && c.Sockets == nil {
			reap(r.Maker)
		}
	}()
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("cannot run a program: %w", context.Cause(ctx))
	case rerr != nil:
		return fmt.Errorf("cannot run a program: the helper in its namespace died: %w", errors.Join(werr, rerr))
	case r.Err != "":
		return errors.New(r.Err + restrictedHint(c.Rootless, r.Denied))
	case r.Queues < 1 || len(files) != r.files():
		return fmt.Errorf("cannot run a program: the helper handed over %d files", len(files))
	}
	if !stop() {
		return fmt.Errorf("cannot run a program: %w", context.Cause(ctx))
	}
	c.conn.SetDeadline(time.Time{})
	c.takeDiag(r, files)
	if r.Maker != 0 {
		if c.Sockets, err = socketsFromFile(files[len(files)-1], r.Maker, c.pid, s.Log); err != nil {
			return err
		}
	}
	c.TUN, c.TUNName, c.TUNIndex, c.IPv6 = files[:r.Queues:r.Queues], r.TUNName, r.TUNIndex, r.IPv6
	files = nil
	return nil
}

// order returns what the helper is told to do.
func (c *Child) order(s Spec) order {
	env := s.Env
	if env == nil {
		env = os.Environ()
	}
	return order{
		Argv:       toBytes(s.Argv),
		Env:        toBytes(env),
		Dir:        []byte(s.Dir),
		TUN:        s.TUN,
		Addrs:      s.Addrs,
		Gateway:    s.Gateway,
		Nameserver: s.Nameserver,
		Search:     s.Search,
		DotsAsIs:   s.DotsAsIs,
		Local:      s.Local,
		Host:       s.Host,
		Sockets:    s.Sockets,
		User:       s.User,
		Kept:       c.keeper != nil,
		Rootless:   c.Rootless,
	}
}

// takeDiag takes the socket that looks up the program's sockets, or the error that says why there is none.
func (c *Child) takeDiag(r report, files []*os.File) {
	if r.DiagErr != "" {
		c.DiagErr = errors.New(r.DiagErr)
		return
	}
	c.Diag, c.DiagErr = DiagFromFile(files[r.Queues])
	if c.Diag != nil {
		c.Diag.SetInterface(r.TUNIndex)
	}
}

// execWait limits how long Exec waits for the program to begin.
const execWait = 10 * time.Second

// Exec makes the helper become the program; the caller's data plane must be ready. Without root, the program then has
// no capabilities and can gain none (no_new_privs). If the program cannot be run, Wait reports it.
//
// Exec returns when the program has begun. A signal that reaches the helper while it becomes the program may be lost: the
// thread that has taken the signal ends by the exec.
func (c *Child) Exec() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.started {
		return nil
	}
	if _, err := c.conn.Write([]byte{goAhead}); err != nil {
		return fmt.Errorf("cannot start the program: the helper in its namespace died: %w", err)
	}
	c.started = true
	c.conn.SetReadDeadline(time.Now().Add(execWait)) // longer if the program's file is on a slow server, for example
	if r, files, err := readReport(c.conn); err == nil {
		closeAll(files)
		c.failed = &r
	}
	return nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// Wait waits for the end of the program and returns its exit status, or 128+n if signal n ended it. An error means
// that the program could not be run: the status is 127 if it was not found and 126 otherwise, and the error tells
// why. Wait may be called once, by one goroutine.
//
// With Spec.FollowStops, a program that stops itself as the terminal would (SIGTSTP, SIGTTIN, SIGTTOU, for example a
// pager's Ctrl-Z) also stops the calling process, so that the shell sees its job stopped. When the caller is
// continued, so is the program. SIGSTOP is not followed: a sender that stops only the program will also continue only
// the program.
func (c *Child) Wait() (exit int, err error) {
	ws, err := c.wait()
	if err != nil {
		return 1, fmt.Errorf("cannot wait for the program: %w", err)
	}
	c.mu.Lock()
	failed := c.failed
	c.mu.Unlock()
	if failed != nil {
		return failed.Exit, errors.New(failed.Err)
	}
	// Anything that the helper had to report later is in the socket. After a successful exec there is nothing.
	c.conn.SetReadDeadline(time.Now().Add(10 * time.Second)) // it is already there; the limit is for what cannot happen
	if r, files, err := readReport(c.conn); err == nil {
		closeAll(files)
		return r.Exit, errors.New(r.Err)
	}
	if ws.Signaled() {
		return 128 + int(ws.Signal()), nil
	}
	return ws.ExitStatus(), nil
}

// EndedBy returns the signal that ended the program, and whether the kernel wrote a core file. It is 0 before Wait has returned,
// and if the program ended by itself.
func (c *Child) EndedBy() (sig syscall.Signal, core bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.reaped || !c.status.Signaled() {
		return 0, false
	}
	return c.status.Signal(), c.status.CoreDump()
}

func (c *Child) wait() (ws syscall.WaitStatus, err error) {
	options := 0
	if c.follow {
		options = syscall.WUNTRACED
	}
	for {
		_, err := syscall.Wait4(c.pid, &ws, options, nil)
		switch {
		case err == syscall.EINTR:
		case err != nil:
			return ws, err
		case ws.Stopped():
			c.stopToo(ws.StopSignal())
		default:
			c.mu.Lock()
			c.reaped, c.status = true, ws
			c.mu.Unlock()
			return ws, nil
		}
	}
}

// stopToo stops this process, as the program is stopped.
func (c *Child) stopToo(sig syscall.Signal) {
	if sig != syscall.SIGTSTP && sig != syscall.SIGTTIN && sig != syscall.SIGTTOU {
		return
	}
	// A Ctrl-Z stopped both processes. If this code runs, the shell is just continuing both, and SIGCONT may not have
	// reached the program yet. Only a program that stays stopped was stopped alone.
	time.Sleep(20 * time.Millisecond)
	if !stopped(c.pid) {
		return
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// Send it to this thread, so that the thread does not run on before the process has stopped.
	unix.Tgkill(os.Getpid(), unix.Gettid(), unix.SIGSTOP)
	c.Signal(syscall.SIGCONT)
}

func stopped(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	s := string(b)
	s = s[strings.LastIndexByte(s, ')')+1:]
	return strings.HasPrefix(s, " T")
}

// Signal sends a signal to the program or, before Exec, to the helper. After the end of the program it returns
// os.ErrProcessDone.
func (c *Child) Signal(sig os.Signal) error {
	s, ok := sig.(syscall.Signal)
	if !ok {
		return fmt.Errorf("cannot send the signal %v", sig)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.reaped {
		return os.ErrProcessDone
	}
	var err error
	if c.pidfd >= 0 {
		err = unix.PidfdSendSignal(c.pidfd, s, nil, 0)
	} else {
		err = syscall.Kill(c.pid, s)
	}
	if err == unix.ESRCH {
		return os.ErrProcessDone
	} else if err != nil {
		return fmt.Errorf("cannot send the signal %v to the program: %w", sig, err)
	}
	return nil
}

// Pid returns the process id, first of the helper and then of the program.
func (c *Child) Pid() int { return c.pid }

// Close closes TUN and Diag. A program that was never started is ended. A running program is left alone, with a
// network that reaches nothing. Close may be called twice, but not during Wait.
func (c *Child) Close() error {
	c.conn.Close()
	CloseTUN(c.TUN)
	if c.Diag != nil {
		c.Diag.Close()
	}
	if c.Sockets != nil {
		c.Sockets.Close()
	}
	c.mu.Lock()
	kill := !c.started && !c.reaped && c.pid != 0
	c.mu.Unlock()
	if kill {
		c.Signal(syscall.SIGKILL)
		c.follow = false
		c.wait()
	}
	c.keeper.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pidfd >= 0 {
		unix.Close(c.pidfd)
		c.pidfd = -1
	}
	c.reaped = true
	return nil
}
