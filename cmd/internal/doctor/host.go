package doctor

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/cmd/internal/daemon"
	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/tun/netns"
)

const tunNode = "/dev/net/tun"

// host is the host that is examined.
type host struct {
	cfg     *config.Config
	environ []string
	root    bool            // this process has the capabilities that up needs
	up      *control.Status // of the viasocks that is up; nil: there is none, or it cannot be asked
	upErr   error           // why up is nil
}

func newHost(o Options) *host {
	h := &host{cfg: o.Config, environ: o.Environ, root: isRoot()}
	path, err := control.Path(h.cfg.StateDir)
	if err != nil {
		h.upErr = err
		return h
	}
	c := control.NewClient(path)
	defer c.Close()
	c.SetTimeout(2 * time.Second)
	if s, err := c.Status(); err == nil {
		h.up = &s
	} else {
		h.upErr = err
	}
	return h
}

// isRoot reports whether this process may change the routes of the host.
func isRoot() bool {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return false
	}
	const need = 1<<unix.CAP_SYS_ADMIN | 1<<unix.CAP_NET_ADMIN
	return os.Geteuid() == 0 && data[0].Effective&need == need
}

// Limits of the checks of the host.
const (
	quick = 3 * time.Second
	trial = 10 * time.Second
)

func (h *host) checks() []check {
	list := []check{
		{name: "kernel", limit: quick, run: h.kernel},
		{name: tunNode, limit: quick, run: func(context.Context) []Finding { return []Finding{tunFinding(tunNode)} }},
		{name: "user namespaces", limit: quick, run: func(context.Context) []Finding { return []Finding{h.userns(sysctl)} }},
		{name: "viasocks run", limit: trial, run: h.tryRun},
		{name: "viasocks up", limit: trial, run: h.tryUp},
		{name: "state", limit: quick, run: h.state},
		{name: "ip rules", limit: quick, run: h.rules},
		{name: "open files", limit: quick, run: openFiles},
		{name: "beside it", limit: quick, run: h.beside},
	}
	for i := range list {
		list[i].part = thisHost
	}
	return list
}

func (h *host) kernel(context.Context) []Finding {
	release := relay.KernelRelease()
	f := Finding{Level: OK, Found: "Linux " + release + "."}
	if on, why := h.cfg.UDPGSO.Decide(release); !on && h.cfg.UDPGSO == relay.GSOAuto {
		f.Level, f.Means = Warning, "UDP through the proxy takes more CPU time: "+why+"."
		f.Do = "use a newer kernel; --udp-gso on if your network card is known to be good"
	}
	return []Finding{f}
}

// tunFinding tests the device node.
func tunFinding(node string) Finding {
	const none = "Neither 'viasocks run' nor 'viasocks up' can start."
	info, err := os.Stat(node)
	if errors.Is(err, fs.ErrNotExist) {
		return Finding{Level: Fault, Found: node + " does not exist.", Means: none,
			Do: "modprobe tun (as root); in a container: docker run --device /dev/net/tun"}
	}
	if err != nil {
		return Finding{Level: Fault, Found: fmt.Sprintf("%s cannot be looked at: %v.", node, errors.Unwrap(err)), Means: none}
	}
	mode := info.Mode()
	st, _ := info.Sys().(*syscall.Stat_t)
	if mode&fs.ModeCharDevice == 0 || st != nil && (unix.Major(st.Rdev) != 10 || unix.Minor(st.Rdev) != 200) {
		return Finding{Level: Fault, Found: node + " is something else than the TUN device (character device 10, 200).",
			Means: none,
			Do:    fmt.Sprintf("rm %s && mknod -m 666 %[1]s c 10 200 (as root)", node)}
	}
	fd, err := unix.Open(node, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	switch {
	case err == nil:
		unix.Close(fd)
		if mode.Perm()&0o006 != 0o006 {
			return Finding{Level: OK, Found: fmt.Sprintf("It can be opened (mode %04o: by this user, not by everybody).",
				mode.Perm())}
		}
		return Finding{Level: OK, Found: "It can be opened."}
	case errors.Is(err, fs.ErrPermission):
		f := Finding{Level: Fault, Found: fmt.Sprintf("This user cannot open %s (mode %04o).", node, mode.Perm()), Means: none,
			Do: "chmod 0666 " + node + " (as root; most systems have this mode), or run viasocks as root"}
		if mode.Perm()&0o006 == 0o006 || os.Geteuid() == 0 {
			f.Do = "allow the device to this container: docker run --device /dev/net/tun"
		}
		return f
	}
	return Finding{
		Level: Fault,
		Found: fmt.Sprintf("%s cannot be opened: %v.", node, err),
		Means: none,
		Do:    "modprobe tun (as root)",
	}
}

const appArmorKey = "kernel.apparmor_restrict_unprivileged_userns"

// closedUserns returns the name of the setting that forbids user namespaces to ordinary users, or an empty string.
func closedUserns(value func(string) string) (key, off, on string) {
	for _, s := range [][3]string{
		{"user.max_user_namespaces", "0", "10000"}, {"kernel.unprivileged_userns_clone", "0", "1"},
	} {
		if value(s[0]) == s[1] {
			return s[0], s[1], s[2]
		}
	}
	return "", "", ""
}

func (h *host) userns(value func(string) string) Finding {
	key, off, on := closedUserns(value)
	switch {
	case key != "":
		f := Finding{Level: Fault, Found: fmt.Sprintf("User namespaces are closed (%s=%s).", key, off),
			Means: "'viasocks run' needs root here.",
			Do:    fmt.Sprintf("sysctl -w %s=%s (as root), or run viasocks as root", key, on)}
		if h.root {
			f.Level, f.Means = Warning, "Only root can use 'viasocks run' here."
		}
		return f
	case value(appArmorKey) == "1":
		f := Finding{Level: OK, Found: "AppArmor restricts them to programs whose profile allows it (" + appArmorKey + "=1)."}
		if h.root {
			f.Means = "Users other than root need the AppArmor profile of the viasocks package for 'viasocks run'."
		}
		return f
	}
	return Finding{Level: OK, Found: "Ordinary users may make them."}
}

// tryRun creates the namespaces and the TUN device that a program would get, without a program.
func (h *host) tryRun(ctx context.Context) []Finding {
	if key, _, _ := closedUserns(sysctl); tunFinding(tunNode).Level == Fault || key != "" && !h.root {
		return []Finding{{Level: Fault, Found: "It cannot start, see above."}}
	}
	child, err := netns.Spawn(ctx, netns.Spec{
		Argv: []string{"true"}, Env: h.environ, TUN: netns.TUNOptions{MTU: cmp.Or(h.cfg.MTU, 1500), VnetHdr: true},
		Addrs: daemon.TUNAddrs(),
	})
	if err != nil {
		f := Finding{Level: Fault, Found: sentence(err), Means: "No program can be run through the proxy."}
		if sysctl(appArmorKey) == "1" && !h.root {
			f.Means = "AppArmor restricts user namespaces on this host (Ubuntu 24.04 and later do so)."
			f.Do = "install the viasocks package, whose AppArmor profile allows them; or sysctl -w " + appArmorKey +
				"=0 (as root)"
		}
		return []Finding{f}
	}
	defer child.Close()
	f := Finding{Level: OK, Found: "A network for a program can be made (tried, and removed again)."}
	if !child.IPv6 {
		f.Means = "This kernel gives it no IPv6: programs have IPv4 only."
	}
	if child.Diag == nil {
		f.Level, f.Means = Warning, fmt.Sprintf(
			"The program's sockets cannot be looked up (%v): UDP mappings end by timeout only.",
			child.DiagErr,
		)
	}
	return []Finding{f}
}

// minFiles is the number of descriptors that a BitTorrent client with some hundred peers needs: two for each
// connection.
const minFiles = 4096

func openFiles(context.Context) []Finding {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return nil
	}
	if l.Max < minFiles {
		return []Finding{{Level: Warning, Found: fmt.Sprintf("At most %d files and connections may be open at a time.", l.Max),
			Means: "A BitTorrent client with many peers will have connections refused.", Do: "raise the limit: ulimit -Hn " +
				"65536, LimitNOFILE= in a unit"}}
	}
	return []Finding{{Level: OK, Found: fmt.Sprintf("Up to %d may be open at a time.", l.Max)}}
}

// sysctl reads a kernel setting. It returns an empty string if the setting does not exist.
func sysctl(key string) string {
	b, err := os.ReadFile("/proc/sys/" + strings.ReplaceAll(key, ".", "/"))
	if err != nil {
		return ""
	}
	return string(bytes.TrimSpace(b))
}

// sentence returns an error as a sentence.
func sentence(err error) string {
	s := strings.TrimSpace(err.Error())
	if s == "" {
		return "It failed."
	}
	return strings.ToUpper(s[:1]) + strings.TrimSuffix(s[1:], ".") + "."
}
