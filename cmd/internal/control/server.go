package control

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/privsock"
)

// Limits of a request.
const (
	maxConns      = 16 // of those who may do everything, and the same number for all others together
	maxHeader     = 8 << 10
	readTimeout   = 5 * time.Second
	answerTimeout = 10 * time.Second
	idleTimeout   = 30 * time.Second
)

// Backend is the daemon that a Server represents. Its functions may be called at any time, and concurrently.
type Backend struct {
	Status func() Status
	Flows  func() []Flow
	Name   func([]Flow) // fills in the programs of the flows that are shown; nil: not available
	// Watch passes events to send from now on, and returns when ctx ends, send fails, or no more events will come. nil: not
	// available.
	Watch func(ctx context.Context, send func([]Event) error)
	// Capture writes what crosses the TUN as pcapng, until a limit is reached, ctx ends or w fails. nil: not available.
	Capture func(ctx context.Context, what Capture, w io.Writer) error
	// Exclude and Include let the traffic of a process go past the proxy, or through it. nil: not available.
	Exclude, Include func(Process) error

	Health func(ctx context.Context) Health // ends soon after ctx; nil: not available
	// returns nil if the steering stays; nil: there is nothing to confirm, as under `run`
	Confirm func() error
	// TakeOver hands the host over to the process pid at the other end of c, which it owns. nil: not available.
	TakeOver func(c *net.UnixConn, pid int)
	// Upgrade starts the program that is on disk now, which takes the host over, and returns its process id. It may take a
	// minute. nil: not available.
	Upgrade func() (pid int, err error)
	Down    func() // begins to stop and returns at once; nil: it ends by itself, as `run` does
}

// Options are the options of a Server.
type Options struct {
	Path    string
	Group   int  // members of this group may read; negative: only root and the daemon's own user
	Members bool // members may also exclude programs from the proxy
	Backend Backend
	Log     *slog.Logger
}

// Server answers requests on a unix socket.
type Server struct {
	o      Options
	l      *listener
	http   *http.Server
	served chan struct{}
	once   sync.Once
	remove func() // removes the socket's directory; nil: it stays

	closing                  context.Context // ends with Close
	endWatch                 context.CancelFunc
	ownersWatch, othersWatch atomic.Int32 // how many watch

	refused atomic.Int64 // when a refusal was last logged, in Unix nanoseconds
}

// Listen creates the socket, replacing one that a killed daemon left, and starts to answer. The caller holds the
// Lock, so no other process listens there.
func Listen(o Options) (*Server, error) {
	fail := func(err error) error { return fmt.Errorf("cannot make the control socket %s: %w", o.Path, err) }
	if err := privsock.MakeDir(filepath.Dir(o.Path)); err != nil {
		return nil, fail(err)
	}
	if err := privsock.RemoveUnused(o.Path); err != nil {
		return nil, fail(err)
	}
	l, err := privsock.Listen(o.Path, o.Group)
	if err != nil {
		return nil, fail(err)
	}
	return serve(o, l), nil
}

// serve answers on l.
func serve(o Options, l acceptor) *Server {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{o: o, l: &listener{acceptor: l}, served: make(chan struct{})}
	s.closing, s.endWatch = context.WithCancel(context.Background())
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", s.look(func(*http.Request) (any, error) {
		st := o.Backend.Status()
		st.noNulls()
		return st, nil
	}))
	mux.HandleFunc("GET /v1/flows", s.look(s.flows))
	if o.Backend.Watch != nil {
		mux.HandleFunc("GET /v1/watch", s.watch)
	}
	if o.Backend.Health != nil {
		mux.HandleFunc("GET /v1/health", s.look(s.health))
	}
	if o.Backend.Capture != nil {
		mux.HandleFunc("GET /v1/capture", s.capture)
	}
	if o.Backend.Confirm != nil {
		mux.HandleFunc("POST /v1/confirm", s.touch(func() error { return o.Backend.Confirm() }))
	}
	if o.Backend.Exclude != nil {
		mux.HandleFunc("POST /v1/exclude", s.choose(o.Members, o.Backend.Exclude))
		mux.HandleFunc("POST /v1/include", s.choose(true, o.Backend.Include))
	}
	if o.Backend.TakeOver != nil {
		mux.HandleFunc("POST /v1/takeover", s.takeover)
	}
	if o.Backend.Upgrade != nil {
		mux.HandleFunc("POST /v1/upgrade", s.upgrade)
	}
	if o.Backend.Down != nil {
		mux.HandleFunc("POST /v1/down", s.touch(func() error { o.Backend.Down(); return nil }))
	}
	s.http = &http.Server{
		Handler: mux, ErrorLog: slog.NewLogLogger(o.Log.Handler(), slog.LevelDebug),
		ReadHeaderTimeout: readTimeout, ReadTimeout: readTimeout, WriteTimeout: answerTimeout, IdleTimeout: idleTimeout,
		MaxHeaderBytes: maxHeader, DisableGeneralOptionsHandler: true,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(context.WithValue(ctx, peerKey{}, c.(*conn).peer), connKey{}, c)
		},
	}
	go func() {
		defer close(s.served)
		s.http.Serve(s.l) // the error only reports that it was closed
	}()
	return s
}

// Close removes the socket and ends requests in progress after a short time. It may be called twice.
func (s *Server) Close() error {
	s.once.Do(func() {
		s.endWatch()
		ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
		defer cancel()
		if s.http.Shutdown(ctx) != nil {
			s.http.Close()
		}
		<-s.served
		if s.remove != nil {
			s.remove()
		}
	})
	return nil
}

type peerKey struct{}

// look handles requests that every client may make.
func (s *Server) look(f func(*http.Request) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		p, _ := r.Context().Value(peerKey{}).(privsock.Peer)
		if !p.Owner() && !p.In(s.o.Group) {
			s.refuse(w, p, mayLook)
			return
		}
		v, err := f(r)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		e := json.NewEncoder(w)
		e.SetEscapeHTML(false)
		_ = e.Encode(v) // the client has gone
	}
}

// touch handles requests of clients that may change something.
func (s *Server) touch(f func() error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		p, _ := r.Context().Value(peerKey{}).(privsock.Peer)
		if !p.Owner() {
			s.refuse(w, p, mayTouch)
			return
		}
		if err := f(); err != nil {
			http.Error(w, err.Error(), http.StatusConflict)
			return
		}
		s.o.Log.Info("control", "request", r.Method+" "+r.URL.Path, "uid", p.UID, "pid", p.PID)
		w.WriteHeader(http.StatusAccepted)
	}
}

// refuseEvery is the minimum time between two logged refusals, because a refused client may repeat its request at any
// rate.
const refuseEvery = time.Second

// A refused client is told who may make its request.
const (
	mayLook   = "only root may, and members of --control-group"
	mayTouch  = "only root may"
	mayChoose = "only root may, and members of --control-group if viasocks was started with --members-exclude"
)

// refuse tells a client who may make its request.
func (s *Server) refuse(w http.ResponseWriter, p privsock.Peer, who string) {
	s.logRefusal(p)
	http.Error(w, "permission denied: "+who, http.StatusForbidden)
}

func (s *Server) logRefusal(p privsock.Peer) {
	now := time.Now().UnixNano()
	if last := s.refused.Load(); now-last >= int64(refuseEvery) && s.refused.CompareAndSwap(last, now) {
		log := s.o.Log
		if p.Err != nil {
			log = log.With("err", p.Err)
		}
		log.Warn("control: refused", "uid", p.UID, "pid", p.PID)
	}
}

func (s *Server) flows(r *http.Request) (any, error) {
	limit := DefaultFlows
	if v := r.URL.Query().Get("limit"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil || n < 1 || n > MaxFlows {
			return nil, fmt.Errorf("limit must be a number from 1 to %d", MaxFlows)
		}
		limit = n
	}
	all := s.o.Backend.Flows()
	SortFlows(all)
	f := Flows{Total: len(all), Flows: all[:min(limit, len(all))]}
	if s.o.Backend.Name != nil {
		s.o.Backend.Name(f.Flows)
	}
	if f.Flows == nil {
		f.Flows = []Flow{}
	}
	return f, nil
}

// SortFlows sorts by the bytes moved, most first, and then by age, oldest first.
func SortFlows(all []Flow) {
	slices.SortFunc(all, func(a, b Flow) int {
		return cmp.Or(cmp.Compare(b.Up+b.Down, a.Up+a.Down), cmp.Compare(a.ID, b.ID))
	})
}

// acceptor is a listening unix socket.
type acceptor interface {
	net.Listener
	AcceptUnix() (*net.UnixConn, error)
}

// listener counts the connections and closes those over the limit. Clients that may do everything are counted
// separately from those that may only read, so that others cannot keep root from 'down'.
type listener struct {
	acceptor
	owners, others atomic.Int32
}

// slots returns the counter for p's connections.
func (l *listener) slots(p privsock.Peer) *atomic.Int32 {
	if p.Owner() {
		return &l.owners
	}
	return &l.others
}

func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		p := privsock.PeerOf(c)
		slots := l.slots(p)
		if slots.Add(1) > maxConns {
			slots.Add(-1)
			c.Close()
			continue
		}
		return &conn{UnixConn: c, slots: slots, peer: p}, nil
	}
}

type conn struct {
	*net.UnixConn
	slots *atomic.Int32
	peer  privsock.Peer
	once  sync.Once
}

func (c *conn) Close() error {
	c.once.Do(func() { c.slots.Add(-1) })
	return c.UnixConn.Close()
}
