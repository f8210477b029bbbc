package daemon

import (
	"cmp"
	"context"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/route"
	"github.com/viasocks/viasocks/route/kernel"
	"github.com/viasocks/viasocks/route/portmap"
	"github.com/viasocks/viasocks/stack/flow"
)

// host is the change to the host, and what was requested.
type host struct {
	*kernel.Host
	cfg *config.Config

	cancel context.CancelFunc // ends the watch; nil: it does not run
	ran    sync.WaitGroup
	once   sync.Once
}

// kernelConfig converts the configuration for route/kernel.
func kernelConfig(cfg *config.Config, log *slog.Logger) kernel.Config {
	h := &cfg.Host
	k := kernel.Config{
		TUN: cfg.TUN, Table: cfg.Table, Priority: h.Priority, NFTable: h.NFTable,
		Marks:        kernel.MarksFrom(cfg.Mark, cfg.Mask),
		CarryInbound: h.Inbound == "carry", InboundPorts: kernelPorts(h.InboundPorts),
		Exclude: kernelSelection(h.Exclude), Include: kernelSelection(h.Include),
		Strict: h.Strict, FailOpen: h.FailOpen,
		Opens: len(cfg.Listen)+len(cfg.FTPActive) > 0,
		Dir:   cfg.StateDir,
		Log:   log,
	}
	if cfg.Gateway() {
		k.PortMap = portmap.Port
	}
	k.Direct = hasDirect(cfg) || cfg.AsksDirect()
	k.Reserved = slices.Concat(flow.Ours[:], cfg.Fake.Pools())
	_, k.Straight = straight(cfg)
	for _, x := range h.ExcludeUnits {
		k.Units = append(k.Units, kernel.Unit(x))
	}
	for _, p := range tunAddrs {
		k.TUNAddrs = append(k.TUNAddrs, p.Addr())
	}
	switch h.LAN {
	case "carry":
		k.LAN = kernel.LANCarry
	case "refuse":
		k.LAN = kernel.LANRefuse
	}
	return k
}

// hasDirect reports whether a rule lets flows out past every proxy.
func hasDirect(cfg *config.Config) bool {
	return slices.ContainsFunc(
		cfg.Rules,
		func(r route.Rule) bool { return r.Action() == route.ActionVia && r.Via() == route.DirectName },
	)
}

func kernelSelection(s config.Selection) kernel.Selection {
	k := kernel.Selection{Networks: s.Nets, Devices: s.Devices, Cgroups: s.Cgroups}
	for _, r := range s.UIDs {
		k.UIDs = append(k.UIDs, kernel.UIDRange{First: r.First, Last: r.Last})
	}
	k.Ports = kernelPorts(s.Ports)
	return k
}

func kernelPorts(ports []config.Range[uint16]) (out []kernel.PortRange) {
	for _, r := range ports {
		out = append(out, kernel.PortRange{First: r.First, Last: r.Last})
	}
	return out
}

func kernelEndpoints(all []endpoint) []kernel.Endpoint {
	var out []kernel.Endpoint
	for _, e := range all {
		proto := uint8(unix.IPPROTO_TCP)
		if e.Proto == flow.UDP {
			proto = unix.IPPROTO_UDP
		}
		out = append(out, kernel.Endpoint{Proto: proto, Addr: e.Addr})
	}
	return out
}

// newHost examines the host and changes nothing. alive and network must not block. before is the viasocks that steers
// the host until now; nil: none.
func newHost(
	cfg *config.Config, alive func() bool, network func(), before *predecessor, log *slog.Logger,
) (*host, error) {
	k := kernelConfig(cfg, log)
	k.Alive, k.OnDefaultRoute = alive, network
	if alive != nil { // the daemon has its own sockets
		k.OwnCgroup, k.OwnUID = ownership("/proc/self/cgroup")
		before.prepare(&k, log)
	} else {
		k.Direct = false
	}
	var err error
	if k.Kept, err = kernel.Established(); err != nil {
		return nil, err
	}
	h, err := kernel.New(k)
	if err != nil {
		return nil, err
	}
	return &host{Host: h, cfg: cfg}, nil
}

// ownership returns what distinguishes our sockets from those of others besides the mark: the control group if
// systemd gave us our own, or else the user if that is not root.
func ownership(file string) (cgroup string, uid *uint32) {
	b, err := os.ReadFile(file)
	if err == nil {
		for line := range strings.Lines(string(b)) {
			path, v2 := strings.CutPrefix(strings.TrimSpace(line), "0::/")
			name := path[strings.LastIndexByte(path, '/')+1:]
			if v2 && strings.HasPrefix(name, "viasocks") && strings.HasSuffix(name, ".service") {
				return path, nil
			}
		}
	}
	if u := uint32(os.Geteuid()); u != 0 {
		return "", &u
	}
	return "", nil
}

// setEndpoints is the function for endpoints.attach.
func (h *host) setEndpoints(all []endpoint) error { return h.SetUpstreams(kernelEndpoints(all)) }

// watch starts to restore what others remove.
func (h *host) watch() {
	ctx, cancel := context.WithCancel(context.Background())
	h.cancel = cancel
	h.ran.Go(func() { h.Run(ctx) })
}

func (h *host) unwatch() {
	h.once.Do(func() {
		if h.cancel != nil {
			h.cancel()
		}
		h.ran.Wait()
	})
}

// HostLines describes in words what Up would do to the host.
func HostLines(cfg *config.Config) (lines []string) {
	var s control.Status
	fillChoices(&s, cfg)
	for _, l := range []struct {
		what  string
		lines []string
	}{
		{"through the proxy", s.Host.Steered},
		{"answered directly", s.Host.Kept},
		{"directly, without the proxy", s.Host.Excluded},
	} {
		for _, line := range l.lines {
			lines = append(lines, l.what+": "+line)
		}
	}
	return lines
}

func fillChoices(s *control.Status, cfg *config.Config) {
	c := &cfg.Host
	s.Host.Steered = []string{"everything that is not named below"}
	if !c.Include.Empty() {
		s.Host.Steered = selectionLines(c.Include)
	}
	s.Host.Kept = []string{"connections from outside"}
	if c.Inbound == "carry" {
		s.Host.Kept = nil
		for _, d := range c.Exclude.Devices {
			s.Host.Kept = append(s.Host.Kept, "connections from outside by device "+d)
		}
	}
	for _, r := range c.InboundPorts {
		s.Host.Kept = append(s.Host.Kept, "UDP port "+r.String()+", whatever it has sent")
	}
	s.Host.Excluded = selectionLines(c.Exclude)
	for _, x := range c.ExcludeUnits {
		s.Host.Excluded = append(s.Host.Excluded, "of unit "+kernel.Unit(x).String())
	}
	switch {
	case c.LAN == "direct" && !c.Strict:
		s.Host.Excluded = append(s.Host.Excluded, "private networks that the host is connected to")
	case c.LAN == "carry":
		s.Host.Steered = append(s.Host.Steered, "private networks that the host is connected to")
	}
	if !c.Include.Empty() {
		s.Host.Excluded = append(s.Host.Excluded, "everything that is not included")
	}
}

// fill adds to the status what was done to the host.
func (h *host) fill(s *control.Status, cfg *config.Config) {
	fillChoices(s, cfg)
	for _, n := range h.PrivateDirect() {
		s.Host.Excluded = append(s.Host.Excluded, "private network "+n)
	}
	programs := h.Programs()
	s.Host.Steered = append(s.Host.Steered, programLines(programs, kernel.IncludeProgram)...)
	s.Host.Excluded = append(s.Host.Excluded, programLines(programs, kernel.ExcludeProgram)...)
	at, _ := straight(cfg)
	for _, i := range at {
		if i < len(s.Rules) {
			s.Rules[i].Kernel = true
		}
	}
	s.Warnings = append(s.Warnings, h.Warnings()...)
	refused, err := h.Counters()
	if err != nil {
		s.Warnings = append(s.Warnings, err.Error())
	}
	for _, r := range refused {
		if r.Packets > 0 {
			s.Host.Refused = append(
				s.Host.Refused,
				control.Counter{Name: r.Reason, What: cmp.Or(reasons[r.Reason], r.Reason), Packets: r.Packets, Bytes: r.Bytes},
			)
		}
	}
}

// reasons are texts for the filter's counters.
var reasons = map[string]string{
	"refused_output":      "without the TUN: bound to a device, or with a mark of another program",
	"refused_dns":         "the same to port 53, and errors that quote an answer from there",
	"refused_multicast":   "multicast and broadcast",
	"refused_no_daemon":   "into the TUN while nobody read it",
	"refused_forward":     "forwarded by this host",
	"refused_postrouting": "routed another way by rules of another program",
	"refused_lan_to_tun":  "from outside to the TUN's address",
	"refused_arp":         "ARP questions for the TUN's address",
	"refused_frame":       "raw frames",
	"refused_full":        "datagrams whose port the filter had no room to note",
}

func selectionLines(s config.Selection) (lines []string) {
	for _, p := range s.Nets {
		if p.IsSingleIP() {
			lines = append(lines, "to "+p.Addr().String())
			continue
		}
		lines = append(lines, "to "+p.String())
	}
	for _, r := range s.UIDs {
		lines = append(lines, "of user "+r.String())
	}
	for _, r := range s.Ports {
		lines = append(lines, "to port "+r.String())
	}
	for _, d := range s.Devices {
		lines = append(lines, "by device "+d)
	}
	for _, c := range s.Cgroups {
		lines = append(lines, "of control group "+c)
	}
	return lines
}
