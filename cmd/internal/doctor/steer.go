package doctor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/cmd/internal/daemon"
	"github.com/viasocks/viasocks/route/kernel"
	"github.com/viasocks/viasocks/tun/netns"
)

// asRoot returns the finding for a check that only root can run.
func asRoot() []Finding {
	return []Finding{
		{Level: NotTested, Found: "Only root can use 'viasocks up' and test it.",
			Do: "sudo viasocks doctor, with the same options"},
	}
}

// tryUp installs the filter of up in a network namespace that it creates for the test.
func (h *host) tryUp(context.Context) []Finding {
	if !h.root {
		return asRoot()
	}
	if err := kernel.Try(daemon.KernelConfig(h.cfg)); err != nil {
		return []Finding{
			{Level: Fault, Found: sentence(err),
				Means: "'viasocks up' cannot carry this host; 'viasocks run' can carry a program."},
		}
	}
	f := Finding{Level: OK, Found: "The kernel takes the rules of nftables that 'up' needs (tried in a namespace of its own)."}
	if err := writable("/proc/sys/net/ipv4/conf/all/src_valid_mark"); err != nil &&
		sysctl("net.ipv4.conf.all.src_valid_mark") != "1" {
		f.Means = "The settings below /proc/sys cannot be changed here, as in many containers."
		if s, lerr := kernel.Look(daemon.KernelConfig(h.cfg)); lerr == nil && len(s.Strict) > 0 {
			f.Level = Fault
			f.Means = fmt.Sprintf(
				"The settings below /proc/sys cannot be changed here, and rp_filter is 1 on %s: 'viasocks up' will not start.",
				strings.Join(s.Strict, ", "),
			)
			f.Do = "start the container with --sysctl net.ipv4.conf.all.src_valid_mark=1"
		}
	}
	return []Finding{f}
}

func writable(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

// state tells what viasocks has changed on this host, and in network namespaces.
func (h *host) state(context.Context) []Finding {
	all := h.ownState()
	if h.root { // others may not see the locks
		all = append(all, leftClosed(h.cfg.StateDir)...)
	}
	return all
}

// leftClosed finds the other network namespaces that a killed viasocks has left closed: their journal in dir is there, but nobody
// has their lock.
func leftClosed(dir string) (all []Finding) {
	var st unix.Stat_t
	if unix.Stat("/proc/thread-self/ns/net", &st) != nil {
		return nil
	}
	for _, ino := range kernel.JournalsElsewhere(dir) {
		users := netns.NewUsers(netns.ID{Dev: st.Dev, Ino: ino})
		if control.Locked(control.PathIn(dir, ino)) || !users.Any() {
			continue
		}
		words, path := calling(users.Name(), users.Seen(), ino)
		all = append(all, Finding{Level: Fault,
			Found: fmt.Sprintf("A viasocks has died, and the network namespace %s is still closed.", words),
			Means: "No program in it reaches anything outside of its own networks.",
			Do:    reopen(path)})
	}
	return all
}

// calling returns how a namespace is called that was seen at a path, and the path to name in advice. A name of 'ip netns' comes
// first, because it stays when a process ends.
func calling(name, seen string, ino uint64) (words, path string) {
	if name != "" {
		return name, "/run/netns/" + name
	}
	return fmt.Sprintf("net:[%d]", ino), seen
}

// reopen tells what opens a network namespace that is at path: below /proc/PID, or a file.
func reopen(path string) string {
	const words = "viasocks attach %s (with the same options) carries it again; viasocks down %[1]s opens it"
	if pid, ok := strings.CutPrefix(path, "/proc/"); ok {
		return fmt.Sprintf(words, "--pid="+strings.TrimSuffix(pid, "/ns/net"))
	}
	dir, name := filepath.Split(path)
	how := fmt.Sprintf(words, "--netns="+name)
	if dir != "/run/netns/" { // where --netns looks for names
		how = fmt.Sprintf("mkdir -p /run/netns && ln -s %s /run/netns/ gives it a name; then %s", path, how)
	}
	return how
}

// ownState is state of this process's own network namespace.
func (h *host) ownState() []Finding {
	if s := h.up; s != nil {
		return h.upFindings(s)
	}
	look, err := kernel.Look(daemon.KernelConfig(h.cfg))
	switch {
	case errors.Is(h.upErr, control.ErrNoDaemon) && err == nil && look.Left:
		return []Finding{{Level: Fault,
			Found: "This host is closed: a 'viasocks up' was killed, or 'viasocks close' has closed it.",
			Means: "No program reaches anything that is not on this host or its private networks.",
			Do:    "viasocks up (with the same options) carries the host again; viasocks down opens it"}}
	case errors.Is(h.upErr, control.ErrNoDaemon):
		return []Finding{{Level: OK, Found: "'viasocks up' is not running, and has left nothing behind."}}
	case h.upErr != nil:
		return []Finding{{Level: NotTested, Found: sentence(h.upErr), Do: "sudo viasocks doctor, with the same options"}}
	}
	return nil
}

func (h *host) upFindings(s *control.Status) []Finding {
	f := Finding{Level: OK, Found: fmt.Sprintf("'viasocks up' is running (process %d, %s).", s.PID, s.State)}
	switch s.State {
	case control.Ready, control.Unconfirmed:
	case control.Waiting:
		f.Level, f.Means = Fault, "This host is closed until the proxy can be reached: "+s.Waiting
	case control.Impaired:
		f.Level = Fault
	default:
		f.Level = Warning
	}
	all := []Finding{f}
	for _, w := range s.Warnings {
		all = append(all, Finding{Level: Warning, Found: "'viasocks status' says: " + sentence(errors.New(w))})
	}
	for _, u := range s.Upstreams {
		if u.TCP == "down" {
			all = append(all, Finding{Level: Fault, Found: fmt.Sprintf("Its proxy %s is down.", cmp.Or(u.URL, u.Name)),
				Means: "Connections through it fail until it can be reached again; see below for why."})
		}
	}
	return all
}

// maxRules limits how many rules of other programs are listed. A script may have made a thousand.
const maxRules = 8

// rules looks for ip rules of other programs, such as VPNs, that conflict with those of up.
func (h *host) rules(context.Context) []Finding {
	look, err := kernel.Look(daemon.KernelConfig(h.cfg))
	if err != nil {
		return []Finding{{Level: NotTested, Found: sentence(err)}}
	}
	var all []Finding
	if look.Conflict != nil {
		what, do, _ := strings.Cut(look.Conflict.Error(), ": see ")
		all = append(
			all,
			Finding{Level: Fault, Found: sentence(errors.New(what)), Means: "'viasocks up' will not start; 'viasocks run' works.",
				Do: "see " + do},
		)
	}
	for _, r := range look.Foreign[:min(len(look.Foreign), maxRules)] {
		f := Finding{Level: Warning, Found: "A rule of another program comes before those of 'viasocks up': " + r.Text + ".",
			Means: "What it routes past viasocks is refused under 'viasocks up'. 'viasocks run' is not concerned."}
		if r.All {
			f.Level = Fault
			f.Means = "It takes all traffic, as a VPN does: nothing would come to viasocks under 'viasocks up', and everything " +
				"would be refused. 'viasocks run' is not concerned."
		}
		if r.Option != "" {
			f.Do = r.Option + " puts the rules of 'viasocks up' first; or stop the other program"
		} else {
			f.Do = "remove the rule, or stop the program that made it"
		}
		all = append(all, f)
	}
	if n := len(look.Foreign) - maxRules; n > 0 {
		all = append(all, Finding{Level: Warning, Found: fmt.Sprintf("There are %d more such rules: see 'ip rule'.", n)})
	}
	if len(all) == 0 {
		all = append(all, Finding{Level: OK, Found: "No rule of another program comes before those of 'viasocks up'."})
	}
	if len(look.Strict) > 0 && h.root {
		all = append(all, Finding{Check: "rp_filter", Level: OK, Found: "rp_filter is 1 on " + strings.Join(look.Strict, ", ") +
			": 'viasocks up' sets src_valid_mark=1, so that the answers of the proxy pass."})
	}
	return all
}
