package socks

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/viasocks/viasocks/stack/loop"
)

// Defaults of GroupOptions.
const (
	DefaultServerAttempts = 1
	DefaultAttempts       = 4
	DefaultFailThreshold  = 2
	DefaultFailWindow     = time.Minute
	DefaultRetryAfter     = 30 * time.Second
)

// GroupOptions of a Group. A zero means the default; below zero is an error.
type GroupOptions struct {
	Name   string // for messages
	Select Select

	ServerAttempts int           // how often one flow tries to connect to one server before the next: 1
	Attempts       int           // how many attempts one flow makes in all: 4
	FailThreshold  int           // so many faults without a success between them take a server out of use: 2
	FailWindow     time.Duration // faults that are older do not count: 1 min
	RetryAfter     time.Duration // how long a server is out of use before it is tried: 30 s
	// Check is how often servers that are in use are looked at beside the flows. Zero: only those that carry associations,
	// whose silence would not be noticed otherwise.
	Check time.Duration

	ConnectTimeout, HandshakeTimeout time.Duration // zero: the Dialer's

	// Via is what the servers are reached through; nil: directly. A chain carries CONNECT only.
	Via Connector
}

// Connector makes connections: a Client or a Group.
type Connector interface {
	Connect(ctx context.Context, l *loop.Loop, dst Addr, done func(s loop.Socket, err error))
}

// fill checks o and sets the defaults.
func (o *GroupOptions) fill() error {
	switch {
	case o.ServerAttempts < 0 || o.Attempts < 0 || o.FailThreshold < 0:
		return errors.New("a number is below 0")
	case o.FailWindow < 0 || o.RetryAfter < 0 || o.Check < 0 || o.ConnectTimeout < 0 || o.HandshakeTimeout < 0:
		return errors.New("a time is below 0")
	case int(o.Select) >= len(selectNames):
		return errors.New("unknown way to select")
	}
	o.ServerAttempts = cmp.Or(o.ServerAttempts, DefaultServerAttempts)
	o.Attempts = cmp.Or(o.Attempts, DefaultAttempts)
	o.FailThreshold = cmp.Or(o.FailThreshold, DefaultFailThreshold)
	o.FailWindow = cmp.Or(o.FailWindow, DefaultFailWindow)
	o.RetryAfter = cmp.Or(o.RetryAfter, DefaultRetryAfter)
	return nil
}

// Group is several servers that carry the same: a flow that one does not take goes to the next, and a server that fails is out of
// use for a while. The state of each server is kept here. A group of one server asks it whatever is known of it. The methods
// may be called from any goroutine.
type Group struct {
	d       *Dialer
	l       *loop.Loop // of trials and looks
	clients []*Client

	mu     sync.Mutex
	c      chooser
	assocs []map[*Association]struct{} // of each server
	looks  []looks                     // at each server
	timer  *time.Timer                 // of the next trial or look; nil: none is planned
	closed bool

	// While nothing speaks against any server, flows neither wait for mu nor write to what others read: see calm.go.
	calm  atomic.Bool
	heard []atomic.Int64 // when each server granted a request past mu

	ctx    context.Context // of trials and looks
	cancel context.CancelFunc

	onUp atomic.Pointer[func()]
}

// Group makes a group of servers, which it asks in an order that o.Select says. Servers are tried
// and looked at on l. It must be closed when it is not used any more.
func (d *Dialer) Group(l *loop.Loop, servers []Server, o GroupOptions) (*Group, error) {
	if err := o.fill(); err != nil {
		return nil, fmt.Errorf("cannot use the group %s: %w", o.Name, err)
	}
	if len(servers) == 0 || len(servers) > MaxServers {
		return nil, fmt.Errorf("cannot use the group %s: it has %d servers, 1 to %d are allowed", o.Name, len(servers), MaxServers)
	}
	g := &Group{
		d:     d,
		l:     l,
		looks: make([]looks, len(servers)),
		heard: make([]atomic.Int64, len(servers)),
		c:     chooser{opts: o, servers: make([]health, len(servers))},
	}
	for _, s := range servers {
		c := d.Client(s)
		c.connectTimeout, c.handshakeTimeout, c.via = o.ConnectTimeout, o.HandshakeTimeout, o.Via
		g.clients = append(g.clients, c)
		g.c.names = append(g.c.names, s.String())
		g.assocs = append(g.assocs, map[*Association]struct{}{})
	}
	g.ctx, g.cancel = context.WithCancel(d.ctx)
	g.lock()
	g.plan()
	g.unlock()
	return g, nil
}

// Close ends trials and looks, and empties the pools. Flows that are under way, and associations, go on. It may be called twice.
func (g *Group) Close() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
	if g.timer != nil {
		g.timer.Stop()
	}
	g.cancel()
	for _, c := range g.clients {
		c.closePools()
	}
	return nil
}

// Renew is for a network that is another one: names are looked up anew, and servers that are out of use are tried at once.
func (g *Group) Renew() {
	for _, c := range g.clients {
		c.Renew()
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for i := range g.c.servers {
		g.c.servers[i].retryAt = g.d.now()
	}
	g.plan()
}

// OnUp sets what is called each time when a server that was out of use is used again. It is called on any goroutine and must not
// block. A second call replaces the first function.
func (g *Group) OnUp(f func()) { g.onUp.Store(&f) }

// BySource reports whether the choice depends on what WithSource tells.
func (g *Group) BySource() bool { return g.c.opts.Select == Hash }

// ByProgram reports whether what WithIsolation tells matters to one of the servers.
func (g *Group) ByProgram() bool { return slices.ContainsFunc(g.clients, (*Client).ByProgram) }

// Tor reports whether one of the servers is a Tor.
func (g *Group) Tor() bool { return slices.ContainsFunc(g.clients, (*Client).Tor) }

// run is a flow, or an association, on its way through the group.
type run struct {
	g         *Group
	l         *loop.Loop
	ctx       context.Context
	dst       Addr
	a         attempt
	server    int // that is asked
	done      func(loop.Socket, error)
	assocDone func(*Association, error)
}

// Connect is Client.Connect by the first server that can. done may be called before it returns.
func (g *Group) Connect(ctx context.Context, l *loop.Loop, dst Addr, done func(s loop.Socket, err error)) {
	g.start(&run{g: g, l: l, ctx: ctx, dst: dst, done: done}, CmdConnect)
}

// Associate is Client.Associate by the first server that can. done may be called before it returns. The association ends when its
// server goes out of use.
func (g *Group) Associate(ctx context.Context, l *loop.Loop, done func(*Association, error)) {
	g.start(&run{g: g, l: l, ctx: ctx, assocDone: done}, CmdAssociate)
}

func (g *Group) start(r *run, cmd Command) {
	var src netip.Addr
	if g.c.opts.Select == Hash {
		src = sourceOf(r.ctx)
	}
	if !g.beginCalm(&r.a, cmd, src, r.dst) {
		g.mu.Lock()
		g.c.begin(&r.a, cmd, src, r.dst)
		g.mu.Unlock()
	}
	r.next()
}

// next asks the next server, or gives up.
func (r *run) next() {
	g := r.g
	server, ok := g.nextCalm(&r.a)
	if !ok {
		g.mu.Lock()
		server, ok = g.c.next(&r.a, g.d.now())
		g.mu.Unlock()
	}
	switch {
	case !ok:
		r.fail(r.a.failure(g.c.opts.Name))
	case r.assocDone != nil:
		r.server = server
		g.clients[server].Associate(r.ctx, r.l, r.associated)
	default:
		r.server = server
		g.clients[server].Connect(r.ctx, r.l, r.dst, r.connected)
	}
}

func (r *run) fail(err error) {
	if r.assocDone != nil {
		r.assocDone(nil, err)
		return
	}
	r.done(loop.NoSocket, err)
}

func (r *run) connected(s loop.Socket, err error) {
	if o := r.g.took(r, err); err == nil {
		r.done(s, nil)
	} else {
		r.failed(o)
	}
}

func (r *run) associated(a *Association, err error) {
	o := r.g.took(r, err)
	if err != nil {
		r.failed(o)
		return
	}
	r.g.keep(a, r.server)
	r.assocDone(a, nil)
}

func (r *run) failed(o outcome) {
	if o.again && r.ctx.Err() == nil {
		r.next()
		return
	}
	r.fail(cmpError(o.err, r.ctx.Err()))
}

// took accounts for the end of an attempt.
func (g *Group) took(r *run, err error) outcome {
	if err == nil && g.grantedCalm(r) {
		return outcome{}
	}
	g.lock()
	h := &g.c.servers[r.server]
	said := h.why
	o := g.c.done(&r.a, r.server, err, g.d.now())
	if o.wentDown {
		g.moveAssociations(r.server)
		g.plan()
	}
	g.unlock()
	g.tell(r.server, o, said, err)
	return o
}

// tell logs what changed. A group of one says nothing: whoever uses it sees all errors.
func (g *Group) tell(server int, o outcome, said, err error) {
	if f := g.onUp.Load(); o.cameUp && f != nil {
		(*f)()
	}
	if len(g.clients) == 1 {
		return
	}
	name := g.c.names[server]
	var fault *ServerError
	switch {
	case o.wentDown:
		g.d.log.Warn("SOCKS server is out of use", "group", g.c.opts.Name, "server", name, "err", err)
	case o.cameUp:
		g.d.log.Info("SOCKS server is used again", "group", g.c.opts.Name, "server", name)
	case errors.As(err, &fault) && fault.Op == OpAuthenticate && said == nil:
		g.d.log.Warn("SOCKS server refuses the login", "group", g.c.opts.Name, "server", name, "err", err)
	}
}

// keep remembers an association for as long as it lives.
func (g *Group) keep(a *Association, server int) {
	g.mu.Lock()
	g.assocs[server][a] = struct{}{}
	g.plan()
	g.mu.Unlock()
	a.onGone(func() {
		g.mu.Lock()
		delete(g.assocs[server], a)
		g.mu.Unlock()
	})
}

// moveAssociations ends those of a server that went down, so that whoever needs them asks for others: if another server is there.
// g.mu is held.
func (g *Group) moveAssociations(server int) {
	if !g.c.othersUp(server) {
		return
	}
	for a := range g.assocs[server] {
		a.fail(&ServerError{Server: g.c.names[server], Op: OpAssociation, Err: errServerDown})
	}
}

// ServerStatus is a server of a group as status shows it.
type ServerStatus struct {
	Server       string // its URL without credentials
	Down         bool
	Why          error         // its last fault; nil after a success
	Retry        time.Duration // Down: until it is tried again; 0: now
	Associations int
}

// Servers lists the servers in the order given.
func (g *Group) Servers() []ServerStatus {
	g.mu.Lock()
	defer g.mu.Unlock()
	var all []ServerStatus
	for i := range g.c.servers {
		h := &g.c.servers[i]
		s := ServerStatus{Server: g.c.names[i], Down: h.isDown, Why: h.why, Associations: len(g.assocs[i])}
		if h.isDown && !h.trying && !g.c.allDown() {
			s.Retry = max(0, h.retryAt-g.d.now())
		}
		all = append(all, s)
	}
	return all
}
