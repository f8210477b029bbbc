package handover

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/viasocks/viasocks/stack"
	"github.com/viasocks/viasocks/stack/flow"
)

// protocol changes when an old and a new process can no longer understand each other. Since 2, Ready and Go come before
// Taken.
const protocol = 2

// Offer is what the old process offers.
type Offer struct {
	Protocol int
	PID      int
	Version  string            // of the old process, for the log
	Settings map[string]string // by option: settings that the new process must share
	Own      string            // what the filter knows the old process's sockets by, see Settings of the daemon
	Sources  int               // how many sockets Commit must have
	Locks    int               // how many of the files are the lock of the control socket
	Heir     int               // the process that the old one has started to take over; 0: none
	Refused  string            // why the host is not offered; the rest is empty then
}

// Flows are the flows that the old process keeps.
type Flows struct {
	TCP [][2]netip.AddrPort `json:",omitempty"` // the program's endpoint and the destination
	UDP []netip.AddrPort    `json:",omitempty"` // the endpoints of programs' sockets
}

// Keys returns the flows as the stack knows them.
func (f Flows) Keys() (keys []stack.Key) {
	for _, p := range f.TCP {
		keys = append(keys, stack.Key{Proto: flow.TCP, Src: p[0], Dst: p[1]})
	}
	for _, a := range f.UDP {
		keys = append(keys, stack.Key{Proto: flow.UDP, Src: a})
	}
	return keys
}

// FlowsOf is the opposite of Keys. Repeated keys count once.
func FlowsOf(keys []stack.Key) (f Flows) {
	seen := make(map[stack.Key]bool, len(keys))
	for _, k := range keys {
		switch {
		case seen[k]:
		case k.Proto == flow.UDP:
			f.UDP = append(f.UDP, k.Src)
		default:
			f.TCP = append(f.TCP, [2]netip.AddrPort{k.Src, k.Dst})
		}
		seen[k] = true
	}
	return f
}

// Len returns the number of flows.
func (f Flows) Len() int { return len(f.TCP) + len(f.UDP) }

// Endpoint is an endpoint of a proxy that the old process uses.
type Endpoint struct {
	UDP  bool
	Addr netip.AddrPort
}

// Taken is what the old process says once it has let go of the host.
type Taken struct {
	Flows
	Proxies []Endpoint // which the filter must still let out
}

// Left tells how the old process's flows end.
type Left struct {
	Ended   Flows
	Now     int        // how many flows it still has
	Proxies []Endpoint // what it uses now; nil: as before
}

// Terms are what the new process asks for.
type Terms struct {
	Limit time.Duration // after which the old process ends, whatever flows it still has
}

type commit struct {
	Protocol int
	Terms
}
type inPlace struct{}
type ready struct{}
type letGo struct{}
type noted struct {
	Stop bool // the old process shall reset its flows and end
}

// Old is the old process's part.
type Old struct {
	c    *net.UnixConn
	news sync.Mutex // held by a Left until it is acknowledged
}

// Files are what changes hands.
type Files struct {
	Control []*os.File // the lock of the control socket
	Kernel  *os.File   // the lock of the host's journal
	Queues  []*os.File // of the TUN device
}

// Close closes all of them.
func (f *Files) Close() {
	closeAll(f.Control)
	if f.Kernel != nil {
		f.Kernel.Close()
	}
	closeAll(f.Queues)
}

// Give sends the offer. The files stay the caller's; Old owns c from now on, even if Give fails.
func Give(c *net.UnixConn, o Offer, f Files) (*Old, error) {
	o.Protocol, o.Locks = protocol, len(f.Control)
	if err := send(c, o, slices.Concat(f.Control, []*os.File{f.Kernel}, f.Queues)...); err != nil {
		c.Close()
		return nil, fmt.Errorf("cannot offer the host: %w", err)
	}
	return &Old{c: c}, nil
}

// Refuse tells the process at the other end of c why the host is not offered. It closes c.
func Refuse(c *net.UnixConn, version, why string) error {
	defer c.Close()
	return send(c, Offer{Protocol: protocol, Version: version, Refused: why})
}

// Commit waits until the new process takes the host and returns the sockets from which frames come. The caller closes
// them. An error means that the new process has given up.
func (o *Old) Commit(want int) (sockets []*os.File, terms Terms, err error) {
	var m commit
	sockets, err = receive(o.c, &m, stepTime)
	if err == nil && m.Limit <= 0 {
		err = errors.New("it set no limit")
	}
	if err == nil && len(sockets) != want {
		err = fmt.Errorf("it sent %d sockets for %d readers", len(sockets), want)
	}
	if err != nil {
		closeAll(sockets)
		return nil, terms, fmt.Errorf("the new viasocks did not take the host: %w", err)
	}
	return sockets, m.Terms, nil
}

// Go asks the new process whether the host shall change hands now. Without an error it has changed hands, and the caller must
// let go. An error means that the new process has given up, and that the host stays the caller's. Go waits three seconds.
func (o *Old) Go() error {
	err := send(o.c, ready{})
	if err == nil {
		_, err = receive(o.c, &letGo{}, goTime)
	}
	if err != nil {
		return fmt.Errorf("the new viasocks did not take the host: %w", err)
	}
	return nil
}

// Taken tells the new process which flows stay, and waits until it is in place. names are the names of fake addresses; it
// stays the caller's, and may be nil.
func (o *Old) Taken(t Taken, names *os.File) error {
	var files []*os.File
	if names != nil {
		files = append(files, names)
	}
	err := send(o.c, t, files...)
	if err == nil {
		_, err = receive(o.c, &inPlace{}, stepTime)
	}
	if err != nil {
		return fmt.Errorf("the new viasocks has failed: %w", err)
	}
	return nil
}

// Left tells which flows have ended, and returns when the new process has taken note. If it returns stop, the caller must
// reset its flows and end. It may be called from any goroutine.
func (o *Old) Left(l Left) (stop bool, err error) {
	o.news.Lock()
	defer o.news.Unlock()
	var n noted
	if err = send(o.c, l); err == nil {
		_, err = receive(o.c, &n, stepTime)
	}
	return n.Stop, err
}

// Close ends the conversation. It may be called twice.
func (o *Old) Close() error { return o.c.Close() }

// New is the new process's part.
type New struct {
	Offer Offer
	Files // owned by the caller

	c *net.UnixConn
}

// Take reads the offer. It owns c from now on, even if it fails.
func Take(c *net.UnixConn) (*New, error) {
	n := &New{c: c}
	files, err := receive(c, &n.Offer, stepTime)
	switch {
	case errors.Is(err, io.EOF):
		err = errors.New("the viasocks that is up does not offer the host: its log tells why")
	case err != nil:
	case n.Offer.Refused != "":
		err = errors.New(n.Offer.Refused)
	case n.Offer.Protocol != protocol:
		err = fmt.Errorf("viasocks %s hands over by another protocol; restart it with 'viasocks down' and 'viasocks up'",
			n.Offer.Version)
	case n.Offer.Locks < 1 || len(files) < n.Offer.Locks+2 || n.Offer.Sources < 1 || n.Offer.Sources > maxFiles:
		err = errors.New("the offer is incomplete")
	}
	if err != nil {
		closeAll(files)
		c.Close()
		return nil, fmt.Errorf("cannot take over: %w", err)
	}
	k := n.Offer.Locks
	n.Files = Files{files[:k], files[k], files[k+1:]}
	return n, nil
}

// Differ returns an error that names the options in which ours differs from the offer, or nil.
func (n *New) Differ(ours map[string]string) error {
	var names []string
	for _, k := range slices.Sorted(maps.Keys(ours)) {
		if was := n.Offer.Settings[k]; was != ours[k] {
			names = append(names, fmt.Sprintf("--%s (it is %q there, %q here)", k, was, ours[k]))
		}
	}
	if len(names) == 0 {
		return nil
	}
	return fmt.Errorf("cannot take over: these settings must be the same: %s", strings.Join(names, ", "))
}

// Commit takes the host. The old process reads its frames from sockets from now on; the caller closes its copies of them. An
// error means that the old process keeps the host. Without an error the host is ours, whatever happens to the old process.
func (n *New) Commit(sockets []*os.File, terms Terms) error {
	err := send(n.c, commit{protocol, terms}, sockets...)
	if err == nil {
		_, err = receive(n.c, &ready{}, stepTime)
	}
	if err == nil {
		err = send(n.c, letGo{})
	}
	if errors.Is(err, io.EOF) {
		err = errors.New("it stops, or it is busy: its log tells why")
	}
	if err != nil {
		return fmt.Errorf("cannot take over: the old viasocks does not let go: %w", err)
	}
	return nil
}

// Taken waits up to a minute for the flows that the old process keeps. The caller closes names, which contains the names of
// fake addresses and is nil if the old process has none.
func (n *New) Taken() (t Taken, names *os.File, err error) {
	files, err := receive(n.c, &t, takenTime)
	if err == nil && len(files) > 1 {
		err = errors.New("it sent too many files")
	}
	if err != nil {
		closeAll(files)
		return t, nil, fmt.Errorf("cannot take over: the old viasocks has failed while it let go: %w", err)
	}
	if len(files) == 1 {
		names = files[0]
	}
	return t, names, nil
}

// InPlace tells the old process that everything is taken.
func (n *New) InPlace() error { return send(n.c, inPlace{}) }

// Left waits for news of the old process's flows and has note take them, which tells whether the old process shall
// reset its flows and end. io.EOF: it has ended.
func (n *New) Left(within time.Duration, note func(Left) (stop bool)) error {
	var l Left
	files, err := receive(n.c, &l, within)
	if err != nil {
		return err
	}
	closeAll(files)
	return send(n.c, noted{note(l)})
}

// End ends the conversation. It may be called twice, and ends a waiting call.
func (n *New) End() error { return n.c.Close() }
