package netns

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A named namespace belongs to somebody else and is left as it was. The TUN disappears with our process, with its addresses and
// routes. What remains is what we changed at lo and in sysctls. The keeper is a process of ours inside that restores it when we
// have ended, also if we were killed.

const (
	// keeperName is argv[0] of the keeper; argv[1] is the number of its socket.
	keeperName = "viasocks-restore"
	// keeperWait limits the waits for the keeper, which makes a few system calls.
	keeperWait = 10 * time.Second
)

// keptSysctls are the sysctls that we may change.
var keptSysctls = []string{
	"net/ipv6/conf/all/disable_ipv6", "net/ipv6/conf/default/disable_ipv6", "net/ipv6/conf/lo/disable_ipv6",
	"net/ipv6/conf/lo/addr_gen_mode", "net/ipv6/conf/lo/accept_ra", "net/ipv6/conf/lo/autoconf", "net/ipv4/ping_group_range",
	"net/ipv4/ip_unprivileged_port_start",
}

// found is the state of a namespace before we changed it.
type found struct {
	Err     string `json:",omitempty"` // why it cannot be used
	Up      bool   // lo
	Addrs   []netip.Prefix
	Sysctls map[string]string
}

// look returns the state of the calling thread's namespace. A namespace with another network device is refused, because the
// program could get past the proxy by it.
func look() (s found, err error) {
	links, err := netlink.LinkList()
	if err != nil {
		return s, fmt.Errorf("cannot list its devices: %w", err)
	}
	for _, l := range links {
		switch a := l.Attrs(); {
		case a.Name == "lo":
			s.Up = a.Flags&net.FlagUp != 0
			all, err := netlink.AddrList(l, netlink.FAMILY_ALL)
			if err != nil {
				return s, fmt.Errorf("cannot list the addresses of lo: %w", err)
			}
			for _, one := range all {
				s.Addrs = append(s.Addrs, prefixOf(one.IPNet))
			}
		case a.Flags&net.FlagUp != 0:
			return s, fmt.Errorf("it has the network device %s, which the program could use to avoid the proxy: "+
				"take one that has only lo, made by 'ip netns add'", a.Name)
		}
	}
	s.Sysctls = make(map[string]string)
	for _, key := range keptSysctls {
		if v := sysctlValue(strings.ReplaceAll(key, "/", ".")); v != "" {
			s.Sysctls[key] = v
		}
	}
	return s, nil
}

func prefixOf(n *net.IPNet) netip.Prefix {
	a, _ := netip.AddrFromSlice(n.IP)
	ones, _ := n.Mask.Size()
	return netip.PrefixFrom(a.Unmap(), ones)
}

// loopback4 is what the kernel gives lo when it comes up.
var loopback4 = netip.PrefixFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 8)

// restore gives the calling thread's namespace the state s again, in which it had not the addresses ours.
func (s *found) restore(ours []netip.Prefix) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("cannot find lo: %w", err)
	}
	var failed []error
	note := func(err error) {
		if err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			failed = append(failed, err)
		}
	}
	// Before lo goes down: writing addr_gen_mode gives it ::1 even if it is down.
	for _, key := range keptSysctls {
		if old, ok := s.Sysctls[key]; ok && old != sysctlValue(strings.ReplaceAll(key, "/", ".")) {
			note(sysctl(key, old))
		}
	}
	if !s.Up {
		note(netlink.LinkSetDown(lo))
		ours = append(slices.Clone(ours), loopback4)
	}
	for _, p := range ours {
		if !slices.Contains(s.Addrs, p) {
			note(netlink.AddrDel(lo, &netlink.Addr{IPNet: ipNet(p)}))
		}
	}
	return errors.Join(failed...)
}

// kept is what the keeper is told.
type kept struct {
	Added []netip.Prefix // the addresses that lo gets
	Was   *found         // the state to restore; nil: that in which the keeper finds the namespace
}

// keeper is the process, seen from outside.
type keeper struct {
	ns     *os.File // locked
	was    found
	added  []netip.Prefix
	tender *tender

	mu       sync.Mutex
	sock     *os.File // the keeper restores the namespace when all copies of it are closed
	pid      int      // until the keeper is reaped, then 0
	restored bool     // the last keeper has restored the namespace
	closed   bool
}

// startKeeper starts the keeper in ns. It takes ownership of ns, even on error. added are the addresses that lo will get.
func startKeeper(ns *os.File, name string, added []netip.Prefix, log *slog.Logger) (*keeper, error) {
	k := &keeper{ns: ns, added: added}
	k.tender = newTender(keeperName, log, k.wait, k.startAgain)
	var err error
	if k.sock, k.pid, k.was, err = k.start(nil); err != nil {
		_ = ns.Close()
		return nil, fmt.Errorf("cannot use the network namespace %q: %w", name, err)
	}
	return k, nil
}

// tend starts the keeper again when it is killed. It is called once, when the helper has its copy of sock, and before
// Close. k may be nil.
func (k *keeper) tend() {
	if k != nil {
		go k.tender.tend()
	}
}

// wait waits for the end of the keeper.
func (k *keeper) wait() (how string) {
	awaitEnd(k.pid) // which only the tender changes
	k.mu.Lock()
	defer k.mu.Unlock()
	ws, err := reaped(k.pid)
	k.restored = err == nil && ws.Exited() && ws.ExitStatus() == 0
	k.pid = 0
	_ = k.sock.Close()
	return describe(ws, err)
}

// startAgain starts another keeper in place of one that was killed.
func (k *keeper) startAgain() error {
	sock, pid, _, err := k.start(&k.was)
	if err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.sock, k.pid = sock, pid
	if k.closed {
		_ = sock.Close()
	}
	return nil
}

// start starts a keeper that restores the state was, or if that is nil the state that it finds.
func (k *keeper) start(was *found) (sock *os.File, pid int, s found, err error) {
	msg, err := json.Marshal(kept{k.added, was})
	if err != nil {
		return nil, 0, s, err
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, 0, s, err
	}
	sock = os.NewFile(uintptr(pair[0]), "keeper")
	theirs := os.NewFile(uintptr(pair[1]), "keeper")
	defer theirs.Close()
	defer func() {
		if err == nil {
			return
		}
		if pid != 0 {
			reap(pid) // before the socket is closed: the namespace is still in use
		}
		_ = sock.Close()
	}()
	c, err := net.FileConn(sock)
	if err != nil {
		return sock, 0, s, err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(keeperWait)); err != nil {
		return sock, 0, s, err
	}
	// The keeper finds its order when it starts, so that it does its work even if this process dies before that.
	if _, err := c.Write(frame(msg)); err != nil {
		return sock, 0, s, err
	}
	if err := within(k.ns, func() (err error) { pid, err = k.launch(theirs); return err }); err != nil {
		return sock, pid, s, err
	}
	_ = theirs.Close() // otherwise the death of the keeper would not end the wait for its answer
	if msg, err = readFrame(c, nil); err == nil {
		err = json.Unmarshal(msg, &s)
	}
	if err == nil && s.Err != "" {
		err = errors.New(s.Err)
	}
	return sock, pid, s, err
}

func (k *keeper) launch(sock *os.File) (pid int, err error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	pid, _, err = syscall.StartProcess("/proc/self/exe", []string{keeperName, "3"}, &syscall.ProcAttr{
		Dir: "/", Env: ownEnv(), Files: []uintptr{null.Fd(), null.Fd(), null.Fd(), sock.Fd(), k.ns.Fd()},
		Sys: &syscall.SysProcAttr{Setsid: true}, // no signal of the terminal reaches it
	})
	return pid, err
}

// Close makes the keeper restore the namespace and waits for that. If the keeper was killed, Close does its work. It may be
// called twice, and k may be nil.
func (k *keeper) Close() {
	if k == nil || k.ns == nil {
		return
	}
	k.mu.Lock()
	k.closed = true
	close(k.tender.stop)
	_ = k.sock.Close()
	k.mu.Unlock()
	late := time.AfterFunc(keeperWait, func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		if k.pid != 0 {
			_ = syscall.Kill(k.pid, syscall.SIGKILL)
		}
	})
	<-k.tender.done
	late.Stop()
	if !k.restored {
		_ = within(k.ns, func() error { return k.was.restore(k.added) })
	}
	_ = k.ns.Close()
	k.ns = nil
}

// keeperMain is the keeper. It tells what it found, waits for the end of the other side, and restores.
func keeperMain(sock int) (exit int) {
	// A service manager may end all our processes at once, and then this one has its work to do.
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT)
	unix.CloseOnExec(4) // the lock, which ends with this process
	var order kept
	msg, err := readFrame(fdReader(sock), nil)
	if err == nil {
		err = json.Unmarshal(msg, &order)
	}
	if err != nil {
		return 1 // nothing was changed
	}
	s := order.Was
	if s == nil {
		now, err := look()
		if err != nil {
			now = found{Err: err.Error()}
		}
		s = &now
	}
	if msg, err = json.Marshal(s); err != nil {
		return 1
	}
	// If the other side has died meanwhile, nobody reads this, and the namespace may already be changed.
	if _, err := unix.Write(sock, frame(msg)); err != nil && order.Was == nil || s.Err != "" {
		return 1
	}
	for {
		var b [1]byte
		if _, err := (fdReader(sock)).Read(b[:]); err != nil {
			break
		}
	}
	if s.restore(order.Added) != nil {
		return 1
	}
	return 0
}
