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

// Default values of GroupOptions.
const (
	DefaultServerAttempts = 1
	DefaultAttempts       = 4
	DefaultFailThreshold  = 2
	DefaultFailWindow     = time.Minute
	DefaultRetryAfter     = 30 * time.Second
)

// GroupOptions are the options of a Group. Zero means the default; a negative value is an error.
type GroupOptions struct {
	Name   string // for messages
	Select Select

	ServerAttempts int           // how often one flow tries to connect to one server before it tries the next: 1
	Attempts       int           // how many attempts one flow makes in total: 4
	FailThreshold  int           // the number of faults, without a success between them, that takes a server out of use: 2
	FailWindow     time.Duration // older faults do not count: 1 min
	RetryAfter     time.Duration // how long a server is out of use before it is tried: 30 s
	// Check is how often servers in use are checked independently of the flows. Zero: only those that carry
	// associations, because their silence would not be noticed otherwise.
	Check time.Duration

	ConnectTimeout, HandshakeTimeout time.Duration // zero: those of the Dialer

	// Via makes the connections to the servers; nil: they are reached directly. A chain carries only CONNECT.
	Via Connector
}

// Connector makes connections. Client and Group implement it.
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

// Group is a set of servers that can carry the same traffic. If one server does not take a flow, the next is asked; a
// server that fails is out of use for a while. The group keeps the state of each server. A group with a single server
// asks it whatever its state is. The methods may be called from any goroutine.
type Group struct {
	d       *Dialer
	l       *loop.Loop // runs trials and checks
	clients []*Client

	mu     sync.Mutex
	c      chooser
	assocs []map[*Association]struct{} // for each server
	looks  []looks                     // for each server
	timer  *time.Timer                 // of the next trial or check; nil: none is planned
	closed bool

	// While nothing is known against any server, flows neither wait for mu nor write to memory that others read: see
	// calm.go.
	calm  atomic.Bool
	heard []atomic.Int64 // when each server last granted a request without mu

	ctx    context.Context // of trials and checks
	cancel context.CancelFunc

	onUp atomic.Pointer[func()]
}

// Group returns a group of servers. o.Select chooses the order in which they are asked. Trials and checks run on l.
// The caller must close the group.
func (d *Dialer) Group(l *loop.Loop, servers []Server, o GroupOptions) (*Group, error) {
	if err := o.fill(); err != nil {
		return nil, fmt.Errorf("cannot use the group %s: %w", o.Name, err)
	}
	if len(servers) == 0 || len(servers) > MaxServers {
		return nil, fmt.Errorf(
			"cannot use the group %s: it has %d servers, 1 to %d are allowed",
			o.Name,
			len(servers),
			MaxServers,
		)
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

// Close ends trials and checks, and empties the pools. Flows in progress and associations continue. It may be called
// twice.
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

// Renew tells the group that the network has changed: names are looked up again, and servers that are out of use are
// tried at once.
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

// OnUp sets the function that is called whenever a server that was out of use is used again. It is called on any
// goroutine and must not block. A second call replaces the first function.
func (g *Group) OnUp(f func()) { g.onUp.Store(&f) }

// BySource reports whether the choice of a server depends on WithSource.
func (g *Group) BySource() bool { return g.c.opts.Select == Hash }

// ByProgram reports whether WithIsolation matters to one of the servers.
func (g *Group) ByProgram() bool { return slices.ContainsFunc(g.clients, (*Client).ByProgram) }

// Tor reports whether one of the servers is a Tor.
func (g *Group) Tor() bool { return slices.ContainsFunc(g.clients, (*Client).Tor) }

// run is a flow, or an association, that is asking the servers of a group.
type run struct {
	g         *Group
	l         *loop.Loop
	ctx       context.Context
	dst       Addr
	a         attempt
	server    int // the one that is asked
	done      func(loop.Socket, error)
	assocDone func(*Association, error)
	bind      *groupBind // BIND; nil: another command
}

// Connect is Client.Connect at the first server that can carry the request. done may be called before Connect
// returns.
func (g *Group) Connect(ctx context.Context, l *loop.Loop, dst Addr, done func(s loop.Socket, err error)) {
	g.start(&run{g: g, l: l, ctx: ctx, dst: dst, done: done}, CmdConnect)
}

// Associate is Client.Associate at the first server that can carry the request. done may be called before Associate
// returns. The association ends when its server goes out of use.
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
	case r.bind != nil:
		r.server = server
		r.bind.ask(r)
	case r.assocDone != nil:
		r.server = server
		g.clients[server].Associate(r.ctx, r.l, r.associated)
	default:
		r.server = server
		g.clients[server].Connect(r.ctx, r.l, r.dst, r.connected)
	}
}

func (r *run) fail(err error) {
	if r.bind != nil {
		r.bind.done(-1, netip.AddrPort{}, err)
		return
	}
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

// took records the result of an attempt.
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

// tell logs what changed. A group of one server logs nothing, because its user sees all errors.
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

// moveAssociations ends the associations of a server that went down, if another server is there, so that their users
// ask for new ones. The caller holds g.mu.
func (g *Group) moveAssociations(server int) {
	if !g.c.othersUp(server) {
		return
	}
	for a := range g.assocs[server] {
		a.fail(&ServerError{Server: g.c.names[server], Op: OpAssociation, Err: errServerDown})
	}
}

// ServerStatus is the state of one server of a group, for the status command.
type ServerStatus struct {
	Server       string // its URL without credentials
	Down         bool
	Why          error         // its last fault; nil after a success
	Retry        time.Duration // if Down: time until the next trial; 0: now
	Associations int
}

// Servers returns the state of the servers, in the order given.
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
