package metrics

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Limits of the server. Prometheus needs one connection, but anything that can reach the port may open more.
const (
	maxConns      = 8
	maxScrapes    = 2 // at a time, because each one reads all flows
	maxHeader     = 8 << 10
	readTimeout   = 5 * time.Second
	answerTimeout = 10 * time.Second
	idleTimeout   = 2 * time.Minute // longer than the usual time between two scrapes
	closeTimeout  = 500 * time.Millisecond
)

// Server answers GET /metrics.
type Server struct {
	http   *http.Server
	served chan struct{}
	once   sync.Once
}

// Options of a Server.
type Options struct {
	Address Address
	Source  func() Source
	Version string // of viasocks
	Log     *slog.Logger
}

// Listen starts a Server, which the caller must close.
func Listen(o Options) (*Server, error) {
	l, err := o.Address.listen()
	if err != nil {
		return nil, fmt.Errorf("cannot serve metrics at %v: %w", o.Address, err)
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(NewCollector(o.Source), buildInfo(o.Version),
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	log := o.Log
	errors := slog.NewLogLogger(log.Handler(), slog.LevelDebug)
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		ErrorLog: errors, ErrorHandling: promhttp.ContinueOnError, MaxRequestsInFlight: maxScrapes, Timeout: answerTimeout,
	}))
	s := &Server{served: make(chan struct{}), http: &http.Server{
		Handler: mux, ErrorLog: errors, MaxHeaderBytes: maxHeader, DisableGeneralOptionsHandler: true,
		ReadHeaderTimeout: readTimeout, ReadTimeout: readTimeout, WriteTimeout: answerTimeout + time.Second,
		IdleTimeout: idleTimeout,
	}}
	go func() {
		defer close(s.served)
		_ = s.http.Serve(&limited{Listener: l}) // it always returns an error once it is closed
	}()
	return s, nil
}

// Close ends the Server and removes its unix socket. It may be called twice.
func (s *Server) Close() error {
	s.once.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
		defer cancel()
		if s.http.Shutdown(ctx) != nil {
			s.http.Close()
		}
		<-s.served
	})
	return nil
}

// limited is a listener that closes connections over the limit.
type limited struct {
	net.Listener
	conns atomic.Int32
}

// Accept implements net.Listener.
func (l *limited) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if l.conns.Add(1) <= maxConns {
			return &counted{Conn: c, of: &l.conns}, nil
		}
		l.conns.Add(-1)
		c.Close()
	}
}

type counted struct {
	net.Conn
	of   *atomic.Int32
	once sync.Once
}

// Close implements net.Conn.
func (c *counted) Close() error {
	c.once.Do(func() { c.of.Add(-1) })
	return c.Conn.Close()
}
