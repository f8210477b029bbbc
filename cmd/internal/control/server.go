package control

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// Bounds of a request.
const (
	maxConns      = 16 // of those who may do everything, and as many of all others together
	maxHeader     = 8 << 10
	readTimeout   = 5 * time.Second
	answerTimeout = 10 * time.Second
	idleTimeout   = 30 * time.Second
)

// Backend is the daemon that a Server speaks for. Its functions may be called at any time, by several at once.
type Backend struct {
	Status  func() Status
	Flows   func() []Flow
	Name    func([]Flow) // fills in the programs of those that are shown; nil: nobody can
	Confirm func() error // its error is nil when the steering stays; nil: there is nothing to confirm, as under `run`
	Down    func()       // starts to stop, returns at once; nil: it ends by itself, as `run` does
}

// Options of a Server.
type Options struct {
	Path    string
	Group   int // members of this group may look; below 0: nobody besides root and the own user
	Backend Backend
	Log     *slog.Logger
}

// Server answers on a unix socket.
type Server struct {
	o      Options
	l      *listener
	http   *http.Server
	served chan struct{}
	once   sync.Once
	remove func() // takes the socket away at the end; nil: the listener does

	refused atomic.Int64 // when a refusal was logged last, in Unix nanoseconds
}

// Listen makes the socket, in place of one that a killed daemon left, and starts to answer. The caller holds the Lock, so
// that nobody listens there.
func Listen(o Options) (*Server, error) {
	fail := func(err error) error { return fmt.Errorf("cannot make the control socket %s: %w", o.Path, err) }
	if err := makeDir(o.Path); err != nil {
		return nil, fail(err)
	}
	if err := RemoveStale(o.Path); err != nil {
		return nil, fail(err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: o.Path, Net: "unix"})
	if err != nil {
		return nil, fail(errors.Unwrap(err))
	}
	mode := os.FileMode(0o600)
	if o.Group >= 0 {
		mode = 0o660
		err = os.Chown(o.Path, -1, o.Group)
	}
	if err == nil {
		err = os.Chmod(o.Path, mode)
	}
	if err != nil {
		l.Close()
		return nil, fail(err)
	}
	return serve(o, l), nil
}

// serve answers on l.
func serve(o Options, l *net.UnixListener) *Server {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{o: o, l: &listener{UnixListener: l}, served: make(chan struct{})}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", s.look(func(*http.Request) (any, error) {
		st := o.Backend.Status()
		st.noNulls()
		return st, nil
	}))
	mux.HandleFunc("GET /v1/flows", s.look(s.flows))
	if o.Backend.Confirm != nil {
		mux.HandleFunc("POST /v1/confirm", s.touch(func() error { return o.Backend.Confirm() }))
	}
	if o.Backend.Down != nil {
		mux.HandleFunc("POST /v1/down", s.touch(func() error { o.Backend.Down(); return nil }))
	}
	s.http = &http.Server{
		Handler: mux, ErrorLog: slog.NewLogLogger(o.Log.Handler(), slog.LevelDebug),
		ReadHeaderTimeout: readTimeout, ReadTimeout: readTimeout, WriteTimeout: answerTimeout, IdleTimeout: idleTimeout,
		MaxHeaderBytes: maxHeader, DisableGeneralOptionsHandler: true,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, peerKey{}, c.(*conn).peer)
		},
	}
	go func() {
		defer close(s.served)
		s.http.Serve(s.l) // the error says that it was closed
	}()
	return s
}

// RemoveStale removes the socket of a killed daemon, if there is one. The caller holds the Lock.
func RemoveStale(path string) error {
	info, err := os.Lstat(path)
	if err != nil {
		return nil
	}
	if info.Mode()&os.ModeSocket == 0 {
		return errors.New("another file is there")
	}
	return os.Remove(path)
}

// Close removes the socket and ends what is being answered, after a moment to finish. It may be called twice.
func (s *Server) Close() error {
	s.once.Do(func() {
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

// look answers whoever may connect at all.
func (s *Server) look(f func(*http.Request) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		p, _ := r.Context().Value(peerKey{}).(peer)
		if !p.owner() && !p.in(s.o.Group) {
			s.refuse(w, p)
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
		_ = e.Encode(v) // the reader has gone
	}
}

// touch is for those who may change something.
func (s *Server) touch(f func() error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		p, _ := r.Context().Value(peerKey{}).(peer)
		if !p.owner() {
			s.refuse(w, p)
			return
		}
		if err := f(); err != nil {
			http.Error(w, err.Error(), http.StatusConflict)
			return
		}
		s.o.Log.Info("control", "request", r.Method+" "+r.URL.Path, "uid", p.uid, "pid", p.pid)
		w.WriteHeader(http.StatusAccepted)
	}
}

// refuseEvery is how often a refusal is logged at most: whoever is refused may ask at any rate.
const refuseEvery = time.Second

func (s *Server) refuse(w http.ResponseWriter, p peer) {
	now := time.Now().UnixNano()
	if last := s.refused.Load(); now-last >= int64(refuseEvery) && s.refused.CompareAndSwap(last, now) {
		s.o.Log.Warn("control: refused", "uid", p.uid, "pid", p.pid, "err", p.err)
	}
	http.Error(w, "permission denied: only root and members of --control-group", http.StatusForbidden)
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

// SortFlows puts those that moved most bytes first, and the older of equals.
func SortFlows(all []Flow) {
	slices.SortFunc(all, func(a, b Flow) int {
		return cmp.Or(cmp.Compare(b.Up+b.Down, a.Up+a.Down), cmp.Compare(a.ID, b.ID))
	})
}

// listener counts the connections there are and closes what is too many. Those who may do everything are counted apart from
// those who may only look, so that nobody else can keep root from 'down'.
type listener struct {
	*net.UnixListener
	owners, others atomic.Int32
}

// slots is the count that p's connections are in.
func (l *listener) slots(p peer) *atomic.Int32 {
	if p.owner() {
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
		p := peerOf(c)
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
	peer  peer
	once  sync.Once
}

func (c *conn) Close() error {
	c.once.Do(func() { c.slots.Add(-1) })
	return c.UnixConn.Close()
}
