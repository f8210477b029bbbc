package route

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/loop"
	"github.com/viasocks/viasocks/stack/testkit"
)

// logBuffer collects log lines.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) lines(with string) (out []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range strings.Lines(l.b.String()) {
		if strings.Contains(line, with) {
			out = append(out, line)
		}
	}
	return out
}

// fakeWriter is the app's side of UDP.
type fakeWriter struct {
	mu      sync.Mutex
	got     []flow.Packet
	refused []flow.Packet
	why     []flow.Refusal
}

func clonePacket(p flow.Packet) flow.Packet {
	p.Payload, p.Head = bytes.Clone(p.Payload), bytes.Clone(p.Head)
	return p
}

func (w *fakeWriter) WritePackets(pkts []flow.Packet) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, p := range pkts {
		w.got = append(w.got, clonePacket(p))
	}
	return len(pkts), nil
}

func (w *fakeWriter) Refuse(p flow.Packet, why flow.Refusal) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.refused = append(w.refused, clonePacket(p))
	w.why = append(w.why, why)
}

func (w *fakeWriter) packets() []flow.Packet {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]flow.Packet(nil), w.got...)
}

func (w *fakeWriter) refusals() []flow.Refusal {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]flow.Refusal(nil), w.why...)
}

// fakeRequest is a SYN of the app.
type fakeRequest struct {
	f  flow.Flow
	mu sync.Mutex

	onCancel func()
	gone     bool
	rejected []flow.Refusal
	accepted int
	stream   *fakeStream
}

func newRequest(src, dst string) *fakeRequest {
	return &fakeRequest{
		f: flow.Flow{Proto: flow.TCP, Src: netip.MustParseAddrPort(src), Dst: netip.MustParseAddrPort(dst), Start: time.Now()},
	}
}

func (q *fakeRequest) Flow() flow.Flow { return q.f }

func (q *fakeRequest) OnCancel(f func()) {
	q.mu.Lock()
	q.onCancel = f
	gone := q.gone
	q.mu.Unlock()
	if gone {
		f()
	}
}

func (q *fakeRequest) giveUp() {
	q.mu.Lock()
	f := q.onCancel
	if q.accepted > 0 || len(q.rejected) > 0 {
		f = nil
	}
	q.gone = true
	q.mu.Unlock()
	if f != nil {
		f()
	}
}

func (q *fakeRequest) Accept(l flow.Listener) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.accepted++; q.accepted > 1 || len(q.rejected) > 0 {
		return
	}
	if q.gone {
		go l.Opened(nil, errors.New("gone"))
		return
	}
	q.stream = &fakeStream{l: l}
	go l.Opened(q.stream, nil)
}

func (q *fakeRequest) Reject(why flow.Refusal) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.rejected = append(q.rejected, why)
}

func (q *fakeRequest) outcome() (accepted bool, rejected []flow.Refusal, s *fakeStream) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.accepted > 0, append([]flow.Refusal(nil), q.rejected...), q.stream
}

// fakeStream is the app's end: what the app sends is put in up, what it gets is in down.
type fakeStream struct {
	l               flow.Listener
	mu              sync.Mutex
	up, down        []byte
	upFIN, downFIN  bool
	aborted, closed bool
}

func (s *fakeStream) send(b string, fin bool) {
	s.mu.Lock()
	s.up = append(s.up, b...)
	s.upFIN = s.upFIN || fin
	s.mu.Unlock()
	s.l.Ready(flow.Readable)
}

func (s *fakeStream) received() (string, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return string(s.down), s.downFIN
}

func (s *fakeStream) ReadTo(w io.Writer) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.aborted:
		return 0, flow.ErrReset
	case len(s.up) == 0 && s.upFIN:
		return 0, io.EOF
	case len(s.up) == 0:
		return 0, flow.ErrAgain
	}
	n, _ := w.Write(s.up)
	s.up = s.up[n:]
	return n, nil
}

func (s *fakeStream) WriteFrom(p flow.Payload) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.aborted {
		return 0, flow.ErrReset
	}
	b := make([]byte, p.Len())
	n, err := io.ReadFull(p, b)
	s.down = append(s.down, b[:n]...)
	return n, err
}

func (s *fakeStream) CloseWrite() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.downFIN = true
	return nil
}

func (s *fakeStream) Abort() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.aborted = true
}

func (s *fakeStream) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	return nil
}

// rig is a running Router with as many loops as shards, a writer that remembers, and a log.
type rig struct {
	*Router
	w   *fakeWriter
	ws  []*fakeWriter // of each shard, where a test wants them apart
	log *logBuffer
}

// newRig runs a Router until the end of the test. change may alter the Router before it runs.
func newRig(t testing.TB, cfg Config, change func(*Router)) *rig {
	t.Helper()
	g := &rig{w: &fakeWriter{}}
	g.run(t, cfg, testShards, testShards, change)
	return g
}

// newShardRig is newRig with writers that are apart.
func newShardRig(t testing.TB, cfg Config, shards, loops int) *rig {
	t.Helper()
	g := &rig{}
	for range shards {
		g.ws = append(g.ws, &fakeWriter{})
	}
	g.run(t, cfg, shards, loops, nil)
	return g
}

func (g *rig) run(t testing.TB, cfg Config, shards, loops int, change func(*Router)) {
	t.Helper()
	g.log = &logBuffer{}
	for range loops {
		loop, err := relay.NewLoop(relay.Config{})
		if err != nil {
			t.Fatal(err)
		}
		loopOver := make(chan struct{})
		go func() { _ = loop.Run(context.Background()); close(loopOver) }()
		t.Cleanup(func() { loop.Close(); <-loopOver })
		cfg.Loops = append(cfg.Loops, loop)
	}
	cfg.Shards = shards
	cfg.Log = slog.New(slog.NewTextHandler(g.log, nil))
	var err error
	if g.Router, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(g.Router)
	}
	g.Attach(func(shard int) flow.PacketWriter {
		if g.ws != nil {
			return g.ws[shard]
		}
		return g.w
	})
	ended := make(chan error, 1)
	go func() { ended <- g.Run(context.Background()) }()
	t.Cleanup(func() {
		g.checkPending(t)
		g.Close()
		g.Close()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
		g.checkPending(t)
	})
	testkit.Eventually(t, "Run to begin", g.ran.Load)
}

// checkPending compares the count of associations that are being opened with those that there are.
func (g *rig) checkPending(t testing.TB) {
	t.Helper()
	g.each(func(table *mappings) {
		n := 0
		for _, m := range table.all {
			for _, a := range m.assocs {
				if a.try != nil && a.link == nil {
					n++
				}
			}
		}
		if table.dialing != n {
			t.Errorf("%d associations are said to be in the making, and %d are", table.dialing, n)
		}
	})
}

// newProxy starts a SOCKS server and a client for it.
func newProxy(t testing.TB, o socks.Options, opts ...sockstest.Option) (*sockstest.Server, *socks.Dialer, *socks.Client) {
	t.Helper()
	srv, err := sockstest.Listen("tcp", "127.0.0.1:0", append(opts, sockstest.WithRedirectsOnly())...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { srv.Close() })
	d, c := newClient(t, srv.URL(), o)
	return srv, d, c
}

func newClient(t testing.TB, url string, o socks.Options) (*socks.Dialer, *socks.Client) {
	t.Helper()
	d, err := socks.NewDialer(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	s, err := socks.ParseServer(url)
	if err != nil {
		t.Fatal(err)
	}
	return d, d.Client(s)
}

// fakeUpstream does as its functions say.
type fakeUpstream struct {
	name string
	dial func(ctx context.Context, d Dest, done func(int, error))
	open func(ctx context.Context, sink func([]flow.Packet), done func(relay.PacketLink, error), closed func(error))
}

func (u *fakeUpstream) Name() string { return u.name }

func (u *fakeUpstream) DialStream(ctx context.Context, _ *relay.Loop, d Dest, done func(loop.Socket, error)) {
	u.dial(ctx, d, func(fd int, err error) { done(loop.Unwatched(fd), err) })
}

func (u *fakeUpstream) OpenPackets(
	ctx context.Context,
	_ *relay.Loop,
	sink func([]flow.Packet),
	done func(relay.PacketLink, error),
	closed func(error),
) {
	u.open(ctx, sink, done, closed)
}

// fakeLink remembers what was sent.
type fakeLink struct {
	mu     sync.Mutex
	sent   []flow.Packet
	calls  int
	closed bool
}

func (l *fakeLink) Send(pkts []flow.Packet) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.calls++
	for _, p := range pkts {
		l.sent = append(l.sent, clonePacket(p))
	}
	return len(pkts), nil
}

func (l *fakeLink) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	return nil
}

func (l *fakeLink) Stats() relay.LinkStats { return relay.LinkStats{} }
func (l *fakeLink) Overflowed() uint64     { return 0 }

func (l *fakeLink) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.sent)
}

func (l *fakeLink) isClosed() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.closed
}
