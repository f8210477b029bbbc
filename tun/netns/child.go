package netns

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// helperName is argv[0] of the helper that Spawn starts. argv[1] is the number of its socket.
const helperName = "viasocks-netns"

// MainIfChild must be the first call in main. In the helper of Spawn, in the maker of Sockets and in the keeper of a
// named namespace it does their work and never returns; in any other process it returns at once.
func MainIfChild() {
	becomeMaker()
	if sock, ok := childSocket(makerName); ok {
		os.Exit(makerMain(sock))
	}
	if sock, ok := childSocket(keeperName); ok {
		os.Exit(keeperMain(sock))
	}
	sock, ok := childSocket(helperName)
	if !ok {
		return
	}
	// Capabilities belong to a thread. They must be dropped by the thread that calls exec.
	runtime.LockOSThread()
	os.Exit(helper(sock))
}

// childSocket returns the number of the socket with which a process of ours with this name was started.
func childSocket(name string) (sock int, ok bool) {
	if len(os.Args) != 2 || os.Args[0] != name {
		return -1, false
	}
	sock, err := strconv.Atoi(os.Args[1])
	if err != nil {
		return -1, false
	}
	if !isSocket(sock) {
		return -1, false
	}
	unix.CloseOnExec(sock)
	return sock, true
}

// isSocket reports whether the descriptor is a unix socket, as those are that our processes are started with.
func isSocket(fd int) bool {
	domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	return err == nil && domain == unix.AF_UNIX
}

// fdReader reads the socket without the runtime's poller, because nothing else happens in the helper.
type fdReader int

func (fd fdReader) Read(b []byte) (int, error) {
	for {
		n, err := unix.Read(int(fd), b)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return 0, err
		case n == 0:
			return 0, errGone
		default:
			return n, nil
		}
	}
}

var errGone = errors.New("the other end is gone")

func helper(sock int) (exit int) {
	var o order
	msg, err := readFrame(fdReader(sock), nil)
	if err == nil {
		err = json.Unmarshal(msg, &o)
	}
	if err != nil {
		return 1 // the parent is gone, so there is nowhere to report to
	}
	if o.Kept {
		unix.CloseOnExec(sock + 1) // while it is open, the namespace is not restored
	}
	if err := prepare(sock, o); err != nil {
		sendReport(sock, report{Err: err.Error(), Denied: errors.Is(err, fs.ErrPermission), Exit: 1})
		return 1
	}
	var ahead [1]byte
	if _, err := (fdReader(sock)).Read(ahead[:]); err != nil || ahead[0] != goAhead {
		return 1
	}
	exit, err = become(o)
	sendReport(sock, report{Err: err.Error(), Exit: exit})
	return exit
}

// prepare sets up the network and the mounts, and sends the files to the parent. It closes the helper's own copies,
// so that nothing holds the TUN if the parent dies.
func prepare(sock int, o order) error {
	if err := isolateMounts(); err != nil {
		return err
	}
	if err := setResolver(o.Nameserver, o.Search, o.DotsAsIs); err != nil {
		return err
	}
	if err := linkUp("lo"); err != nil {
		return err
	}
	setSysctls(o)
	queues, name, err := OpenTUN(o.TUN)
	if err != nil {
		return err
	}
	defer CloseTUN(queues)
	r := report{TUNName: name}
	if r.IPv6, err = configureAll(name, o); err != nil {
		return err
	}
	link, err := net.InterfaceByName(name)
	if err != nil {
		return fmt.Errorf("cannot find %s: %w", name, err)
	}
	r.TUNIndex = link.Index
	mountSysfs() // after the network, because it shows the network namespace
	fds := make([]int, len(queues), len(queues)+1)
	for i, f := range queues {
		fds[i] = int(f.Fd()) // not closed before the message is sent
	}
	r.Queues = len(fds)
	diag, err := openDiagSocket()
	if err != nil {
		r.DiagErr = err.Error()
	} else {
		defer unix.Close(diag)
		fds = append(fds, diag)
	}
	if o.Sockets {
		maker, pid, err := startMaker()
		if err != nil {
			return err
		}
		defer unix.Close(maker)
		fds, r.Maker = append(fds, maker), pid
	}
	if err := sendReport(sock, r, fds...); err != nil {
		return fmt.Errorf("cannot hand %s over: %w", name, err)
	}
	return nil
}

// configureAll gives the namespace its addresses and routes, and the name of the host. ipv6 tells whether it has IPv6.
func configureAll(name string, o order) (ipv6 bool, err error) {
	if ipv6, err = Configure(name, o.TUN.MTU, o.Addrs, true); err != nil {
		return false, err
	}
	if o.Gateway.IsValid() {
		if err := setGateway(name, o.Gateway); err != nil {
			return false, err
		}
	}
	if len(o.Local) > 0 {
		if _, err := Configure("lo", 0, o.Local, false); err != nil {
			return false, err
		}
	}
	return ipv6, addHost(o.Host, ipv6)
}

// setSysctls sets what the namespace needs besides its devices, as far as that is possible.
func setSysctls(o order) {
	if slices.ContainsFunc(o.Addrs, func(p netip.Prefix) bool { return p.Addr().Is6() }) {
		// Some hosts switch IPv6 off by default. For the app, IPv6 ends in the TUN as IPv4 does.
		sysctl("net/ipv6/conf/all/disable_ipv6", "0")
		sysctl("net/ipv6/conf/default/disable_ipv6", "0")
	}
	gid := strconv.Itoa(os.Getgid())
	if o.User != nil {
		gid = strconv.Itoa(o.User.GID)
	}
	sysctl("net/ipv4/ping_group_range", gid+" "+gid)
	sysctl("net/ipv4/ip_unprivileged_port_start", "0") // all ports of this network belong to the program
}

// become executes the program. It returns only if that fails, with the exit status that a shell would use.
func become(o order) (exit int, err error) {
	argv, env := toStrings(o.Argv), toStrings(o.Env)
	if err := o.User.become(); err != nil {
		return 126, fmt.Errorf("cannot run %s: %w", argv[0], err)
	}
	if dir := string(o.Dir); dir != "" {
		if err := os.Chdir(dir); err != nil {
			return 126, fmt.Errorf("cannot run %s: %w", argv[0], err)
		}
	}
	if o.Rootless {
		if err := dropCapabilities(); err != nil {
			return 126, fmt.Errorf("cannot run %s: cannot drop privileges: %w", argv[0], err)
		}
	}
	name := argv[0]
	if strings.Contains(name, "/") {
		return execError(name, name, tryExec(name, argv, env))
	}
	last := error(unix.ENOENT)
	for dir := range strings.SplitSeq(pathOf(env), ":") {
		if dir == "" {
			dir = "."
		}
		switch err := tryExec(dir+"/"+name, argv, env); err {
		case unix.ENOENT, unix.ENOTDIR:
		case unix.EACCES:
			last = err
		default:
			return execError(name, dir+"/"+name, err)
		}
	}
	return execError(name, "", last)
}

// tryExec is one attempt of execvp(3). It runs a file without a magic number as a script of sh.
func tryExec(path string, argv, env []string) error {
	err := syscall.Exec(path, argv, env)
	if err == unix.ENOEXEC {
		err = syscall.Exec("/bin/sh", append([]string{"sh", path}, argv[1:]...), env)
	}
	if err == unix.ENOENT {
		if _, serr := os.Stat(path); serr == nil {
			return errInterpreter
		}
	}
	return err
}

var errInterpreter = errors.New("the interpreter or loader that it names is missing")

func execError(name, path string, err error) (int, error) {
	switch {
	case err == unix.ENOENT && path == "":
		return 127, fmt.Errorf("cannot run %s: not found in PATH", name)
	case err == unix.ENOENT || err == unix.ENOTDIR:
		return 127, fmt.Errorf("cannot run %s: %w", name, err)
	}
	if st, serr := os.Stat(path); err == unix.EACCES && serr == nil && st.IsDir() {
		return 126, fmt.Errorf("cannot run %s: is a directory", name)
	}
	return 126, fmt.Errorf("cannot run %s: %w", name, err)
}

// pathOf returns PATH of env, or the default of shells if there is none.
func pathOf(env []string) string {
	for _, e := range env {
		if p, ok := strings.CutPrefix(e, "PATH="); ok {
			return p
		}
	}
	return "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
}
