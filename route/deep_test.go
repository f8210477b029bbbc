package route

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
)

// fakeOwners answers by source, once it may.
type fakeOwners struct {
	mu    sync.Mutex
	by    map[netip.AddrPort]flow.Owner
	hold  chan struct{} // nil: answers at once
	stuck int           // calls that wait for hold
	asked int
}

// block makes all later calls wait until the function that it returns is called, or the test ends.
func (o *fakeOwners) block(t testing.TB) (release func()) {
	hold := make(chan struct{})
	o.mu.Lock()
	defer o.mu.Unlock()
	o.hold = hold
	release = sync.OnceFunc(func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		o.hold = nil
		close(hold)
	})
	t.Cleanup(release) // a test that fails must not leave the Router waiting
	return release
}

// waiting returns how many calls wait to be released.
func (o *fakeOwners) waiting() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.stuck
}

func (o *fakeOwners) OwnersOf(flows []flow.Flow, owners []flow.Owner) {
	o.mu.Lock()
	if hold := o.hold; hold != nil {
		o.stuck++
		o.mu.Unlock()
		<-hold
		o.mu.Lock()
		o.stuck--
	}
	defer o.mu.Unlock()
	for i, f := range flows {
		o.asked++
		owners[i] = o.by[f.Src]
	}
}

func (o *fakeOwners) set(src string, owner flow.Owner) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.by == nil {
		o.by = map[netip.AddrPort]flow.Owner{}
	}
	o.by[netip.MustParseAddrPort(src)] = owner
}

func (o *fakeOwners) times() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.asked
}

// links collects what is sent through an upstream.
func (u *manualUpstream) link(t testing.TB, i int) *fakeLink {
	t.Helper()
	l := &fakeLink{}
	u.ask(t, i).done(l, nil)
	return l
}

func packet(src, dst, payload string) flow.Packet {
	return flow.Packet{
		Src:     netip.MustParseAddrPort(src),
		Dst:     netip.MustParseAddrPort(dst),
		Payload: []byte(payload),
		Head:    make([]byte, 28),
	}
}

// Two sources talk to one destination, in one burst and in turns, and a rule tells them apart: what was decided for one is never
// the other's.
func TestVerdictsOnDatagramsBySource(t *testing.T) {
	testkit.CheckLeaks(t)
	var u manualUpstream
	g := newRig(
		t,
		Config{Upstreams: []Upstream{u.upstream("p")}, Default: "p", Rules: []Rule{mustRule(t, "src 10.0.0.2 reject")}},
		nil,
	)
	const dst = "203.0.113.1:1000"
	burst := []flow.Packet{
		packet("10.0.0.1:1", dst, "a"),
		packet("10.0.0.2:1", dst, "b"),
		packet("10.0.0.1:1", dst, "c"),
		packet("10.0.0.2:1", dst, "d"),
	}
	g.HandlePackets(burst)
	l := u.link(t, 0)
	testkit.Eventually(t, "the link", func() bool { return g.Stats().Pending == 0 })
	for range 3 {
		g.HandlePackets(burst)
		for i := range burst {
			g.HandlePackets(burst[i : i+1])
		}
	}
	testkit.Eventually(t, "all of one source", func() bool { return l.count() == 2+3*4 })
	if s := g.Stats(); s.Refused != 2+3*4 || s.MappingsNow != 1 {
		t.Errorf("%d refused, %d mappings", s.Refused, s.MappingsNow)
	}
	for _, p := range l.sent {
		if p.Src != burst[0].Src {
			t.Errorf("%v was carried", p.Src)
		}
	}
	// A policy that looks at the destination alone has the plain cache again, and the other way round.
	g.each(func(table *mappings) {
		if table.deep == nil {
			t.Error("the cache of sources is not used")
		}
	})
	for _, rule := range []string{"dst 10.0.0.0/8 reject", "not src 10.0.0.1 reject"} {
		if err := g.Reload(Policy{Upstreams: []Upstream{g.policy.Load().order[0].Upstream}, Default: "p",
			Rules: []Rule{mustRule(t, rule)}}); err != nil {
			t.Fatal(err)
		}
		g.each(func(table *mappings) {
			if deep := table.deep != nil; deep == strings.HasPrefix(rule, "dst") {
				t.Errorf("%q: the cache of sources is used: %v", rule, deep)
			}
		})
	}
	g.HandlePackets(burst)
	if s := g.Stats(); s.Refused != 2+3*4+2 {
		t.Errorf("%d refused", s.Refused)
	}
}

// Datagrams wait for their owner, in order, and then go or do not go; a port that becomes another program's is judged anew.
func TestDatagramsWaitForTheirOwner(t *testing.T) {
	testkit.CheckLeaks(t)
	var u manualUpstream
	owners := &fakeOwners{}
	const one, two, dst = "10.0.0.1:1", "10.0.0.1:2", "203.0.113.1:1000"
	owners.set(one, flow.Owner{Known: true, UID: 1000})
	owners.set(two, flow.Owner{Known: true, UID: 1001})
	g := newRig(t, Config{
		Upstreams: []Upstream{u.upstream("p")}, Owners: owners,
		Rules: []Rule{mustRule(t, "port 53 drop"), mustRule(t, "user 1000 via p"), mustRule(t, "not user 1000 reject")},
	}, nil)
	release := owners.block(t)
	g.HandlePackets([]flow.Packet{packet(one, "203.0.113.1:53", "x")})
	if owners.times() != 0 || g.Stats().Dropped != 1 {
		t.Error("an owner was asked for that no rule needed")
	}
	for i := range 5 {
		g.HandlePackets([]flow.Packet{packet(one, dst, fmt.Sprint("one ", i)), packet(two, dst, fmt.Sprint("two ", i))})
	}
	if s := g.Stats(); s.MappingsNow != 0 || s.Refused != 0 {
		t.Errorf("decided without the owner: %+v", s)
	}
	release()
	l := u.link(t, 0)
	testkit.Eventually(t, "what waited", func() bool { return l.count() == 5 && g.Stats().Refused == 5 })
	for i, p := range l.sent {
		if string(p.Payload) != fmt.Sprint("one ", i) || p.Src.String() != one {
			t.Errorf("%d: %s from %v", i, p.Payload, p.Src)
		}
	}
	g.each(func(table *mappings) {
		if held := table.owners.held; held != 0 {
			t.Errorf("%d bytes are held", held)
		}
	})
	// The port is another user's now: that is noticed within two seconds.
	owners.set(one, flow.Owner{Known: true, UID: 1001})
	testkit.Eventually(t, "the new owner", func() bool {
		before := g.Stats().Refused
		g.HandlePackets([]flow.Packet{packet(one, dst, "again")})
		return g.Stats().Refused > before
	})
}

// What is held is bounded: for one source, and in all.
func TestHeldDatagramsAreBounded(t *testing.T) {
	var u manualUpstream
	owners := &fakeOwners{hold: make(chan struct{})}
	g := newRig(
		t,
		Config{Upstreams: []Upstream{u.upstream("p")}, Owners: owners, Rules: []Rule{mustRule(t, "user 1 via p")}},
		nil,
	)
	defer close(owners.hold)
	big := strings.Repeat("x", 1000)
	for range 3 * queueLen {
		g.HandlePackets([]flow.Packet{packet("10.0.0.1:1", "203.0.113.1:1000", big)})
	}
	if n := g.Stats().QueueFull; n != 2*queueLen {
		t.Errorf("%d datagrams were lost", n)
	}
	for i := range 300 {
		for range queueLen {
			g.HandlePackets([]flow.Packet{packet(fmt.Sprintf("10.0.1.%d:%d", i%200+1, 1+i), "203.0.113.1:1000", big)})
		}
	}
	g.each(func(table *mappings) {
		if held, most := table.owners.held, g.share(heldAll); held > most || held < most-2000 {
			t.Errorf("%d bytes are held", held)
		}
	})
}

// A stream waits for its owner without an answer; one that finds no room is forgotten and comes again; at the end none is
// left without an answer.
func TestStreamsWaitForTheirOwner(t *testing.T) {
	testkit.CheckLeaks(t)
	owners := &fakeOwners{}
	owners.set("10.0.0.1:1", flow.Owner{Known: true, UID: 7, Exe: "/usr/bin/curl"})
	dialed := make(chan Dest, 4)
	up := &fakeUpstream{name: "p", dial: func(_ context.Context, d Dest, done func(int, error)) {
		dialed <- d
		go done(-1, context.Canceled)
	}}
	g := newRig(t, Config{Upstreams: []Upstream{up}, Owners: owners, Rules: []Rule{mustRule(t, "exe */curl via p")}}, nil)
	release := owners.block(t)
	yes, no := newRequest("10.0.0.1:1", "203.0.113.1:80"), newRequest("10.0.0.1:2", "203.0.113.1:80")
	g.HandleStream(yes)
	g.HandleStream(no)
	if decided, _, _ := yes.outcome(); decided {
		t.Error("decided without the owner")
	}
	release()
	if why := refusal(t, no); why != flow.RefuseReset {
		t.Errorf("refused with %v", why)
	}
	if d := <-dialed; d.Addr.Port() != 80 {
		t.Error(d)
	}
	// A queue without room: nothing is taken from it while the look-up of the first batch waits.
	release = owners.block(t)
	var all []*fakeRequest
	ask := func() {
		q := newRequest(fmt.Sprintf("10.0.0.3:%d", len(all)+1), "203.0.113.1:80")
		all = append(all, q)
		g.HandleStream(q)
	}
	ask()
	testkit.Eventually(t, "the look-up", func() bool { return owners.waiting() == 1 })
	for range askQueue + 10 {
		ask()
	}
	if why := refusal(t, all[len(all)-1]); why != flow.RefuseLater {
		t.Errorf("over the limit: %v", why)
	}
	if n := g.Stats().AsksFull; n != 10 {
		t.Errorf("%d are counted", n)
	}
	g.cancel()
	release()
	for _, q := range all {
		refusal(t, q)
	}
}

// Without anybody to ask, an owner is unknown, and nothing waits.
func TestNobodyToAsk(t *testing.T) {
	var u manualUpstream
	g := newRig(
		t,
		Config{
			Upstreams: []Upstream{u.upstream("p")},
			Rules:     []Rule{mustRule(t, "not user 0-4294967295 reject"), mustRule(t, "via p")},
		},
		nil,
	)
	q := newRequest("10.0.0.1:1", "203.0.113.1:80")
	g.HandleStream(q)
	if why := refusal(t, q); why != flow.RefuseReset {
		t.Errorf("refused with %v", why)
	}
	g.HandlePackets([]flow.Packet{packet("10.0.0.1:1", "203.0.113.1:80", "x")})
	if n := g.Stats().Refused; n != 1 {
		t.Errorf("%d refused", n)
	}
}

// Names come from answers, are believed for their time, and a new one counts at once.
func TestNamesOfFlows(t *testing.T) {
	var names nameTable
	at := netip.MustParseAddr("192.0.2.7")
	of := func(now time.Duration) string { return strings.Join(names.of(at, int64(now), nil), " ") }
	add := func(name string, now, ttl time.Duration) { names.add(at, name, int64(now), int64(now+ttl)) }
	add("a.example", 0, time.Minute)
	add("b.example", 0, time.Hour)
	if got := of(59 * time.Second); got != "a.example b.example" {
		t.Error(got)
	}
	if got := of(time.Minute); got != "b.example" {
		t.Error(got)
	}
	before := names.changes.Load()
	add("b.example", time.Minute, time.Hour)
	if names.changes.Load() != before {
		t.Error("nothing changed, and a change is counted")
	}
	add("a.example", 2*time.Minute, time.Hour)
	if names.changes.Load() == before {
		t.Error("a name came back, and no change is counted")
	}
	for i := range 2 * maxNames {
		add(fmt.Sprint("n", i), 3*time.Minute, time.Duration(i+100)*time.Hour)
	}
	if got := strings.Fields(of(3 * time.Minute)); len(got) != maxNames || got[len(got)-1][0] != 'n' {
		t.Error(got)
	}
	for i := range maxNamed + maxNamed/2 {
		names.add(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), "x", 0, int64(time.Hour))
	}
	if n := len(names.byAddr); n > maxNamed || n < maxNamed/2 {
		t.Errorf("%d addresses are known", n)
	}
}

// A rule that speaks of names decides by the answer that the app was given, for datagrams that were refused a moment ago, too.
func TestRulesByName(t *testing.T) {
	var u manualUpstream
	g := newRig(t, Config{Upstreams: []Upstream{u.upstream("p")}, Rules: []Rule{mustRule(t, "name .example.com via p")}}, nil)
	dst := "192.0.2.7:443"
	refused := newRequest("10.0.0.1:1", dst)
	g.HandleStream(refused)
	if why := refusal(t, refused); why != flow.RefuseReset {
		t.Errorf("refused with %v", why)
	}
	send := func() (refused bool) {
		before := g.Stats().Refused
		g.HandlePackets([]flow.Packet{packet("10.0.0.1:1", dst, "x")})
		return g.Stats().Refused > before
	}
	if !send() {
		t.Error("a datagram to an address without a name was carried")
	}
	g.names.add(netip.MustParseAddr("192.0.2.7"), "www.example.com", g.now(), g.now()+int64(time.Hour))
	if send() {
		t.Error("a datagram to an address with the name was refused")
	} else {
		u.link(t, 0)
	}
	q := g.queryOf(flow.Flow{Proto: flow.TCP, Src: netip.MustParseAddrPort("10.0.0.1:1"), Dst: netip.MustParseAddrPort(dst)},
		Dest{Addr: netip.MustParseAddrPort(dst)})
	if v := g.verdictOn(&q); v.kind != carry {
		t.Errorf("%+v", v)
	}
	// A name that the flow has of itself counts alone.
	q = g.queryOf(flow.Flow{Proto: flow.TCP}, Dest{Addr: netip.MustParseAddrPort(dst), Name: "WWW.other.test."})
	if fmt.Sprint(q.names) != "[www.other.test]" {
		t.Errorf("%q", q.names)
	}
}

// lockedBuffer is a writer that can be held up.
type lockedBuffer struct {
	mu   sync.Mutex
	b    bytes.Buffer
	fail error
	wait chan struct{}
}

func (l *lockedBuffer) Write(b []byte) (int, error) {
	if l.wait != nil {
		<-l.wait
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fail != nil {
		return 0, l.fail
	}
	return l.b.Write(b)
}

func (l *lockedBuffer) lines(t *testing.T) (all []decisionLine) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range strings.Lines(l.b.String()) {
		var d decisionLine
		if err := json.Unmarshal([]byte(line), &d); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		all = append(all, d)
	}
	return all
}

// Each flow is decided on once in the file, whatever it sends.
func TestDecisions(t *testing.T) {
	testkit.CheckLeaks(t)
	var u manualUpstream
	out := &lockedBuffer{}
	owners := &fakeOwners{}
	owners.set("10.0.0.1:1", flow.Owner{Known: true, UID: 0, PID: 9, Exe: "/bin/x", Cgroup: "g"})
	g := newRig(t, Config{
		Upstreams: []Upstream{u.upstream("p")}, Default: "p", Owners: owners, Decisions: out,
		Rules: []Rule{mustRule(t, "port 81 reject"), mustRule(t, "port 82 drop")},
	}, nil)
	g.HandleStream(newRequest("10.0.0.1:1", "203.0.113.1:81"))
	for range 3 {
		g.HandlePackets(
			[]flow.Packet{
				packet("10.0.0.1:1", "203.0.113.1:80", "x"),
				packet("10.0.0.1:1", "203.0.113.1:82", "x"),
				packet("10.0.0.2:1", "203.0.113.1:80", "x"),
			},
		)
		testkit.Pace(20 * time.Millisecond)
	}
	testkit.Eventually(t, "the lines", func() bool { return len(out.lines(t)) >= 4 })
	u.link(t, 0)
	u.link(t, 1)
	got := map[string]int{}
	for _, l := range out.lines(t) {
		uid := "?"
		if l.UID != nil {
			uid = fmt.Sprintf("%d %d %s %s", *l.UID, l.PID, l.Exe, l.Cgroup)
		}
		got[strings.Join([]string{l.Proto, l.Src, l.Dst, l.Verdict, l.Rule, uid}, " ")]++
	}
	for _, want := range []string{
		"tcp 10.0.0.1:1 203.0.113.1:81 reject port 81 reject 0 9 /bin/x g",
		"udp 10.0.0.1:1 203.0.113.1:80 via p default 0 9 /bin/x g",
		"udp 10.0.0.1:1 203.0.113.1:82 drop port 82 drop 0 9 /bin/x g", "udp 10.0.0.2:1 203.0.113.1:80 via p default ?",
	} {
		if got[want] != 1 {
			t.Errorf("%q is there %d times, in %v", want, got[want], got)
		}
	}
}

// A reader that does not read holds up no flow; what is lost is counted, and said in the file.
func TestDecisionsAreLostAndNotWaitedFor(t *testing.T) {
	out := &lockedBuffer{wait: make(chan struct{})}
	g := newRig(t, Config{Decisions: out}, nil)
	start := time.Now()
	const n = 3 * decisionQueue
	for i := range n {
		g.HandleStream(newRequest("10.0.0.1:1", fmt.Sprintf("203.0.113.%d:81", i%250)))
	}
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("it took %v", took)
	}
	lost := g.Stats().DecisionsLost
	if lost < decisionQueue || lost > n-decisionQueue {
		t.Errorf("%d of %d are lost", lost, n)
	}
	close(out.wait)
	testkit.Eventually(t, "all that is left", func() bool { return uint64(len(out.lines(t))) >= n-lost })
	g.HandleStream(newRequest("10.0.0.1:1", "203.0.113.9:81"))
	testkit.Eventually(t, "the count", func() bool {
		sum, others := uint64(0), uint64(0)
		for _, l := range out.lines(t) {
			if sum += l.Lost; l.Lost == 0 {
				others++
			}
		}
		return sum == lost && others == n-lost+1
	})
	out.mu.Lock()
	out.fail = fmt.Errorf("no space left on device")
	out.mu.Unlock()
	g.HandleStream(newRequest("10.0.0.1:1", "203.0.113.9:81"))
	testkit.Eventually(t, "a fault is said and counted", func() bool {
		return g.Stats().DecisionsLost == lost+1 && len(g.log.lines("decisions cannot be written")) == 1
	})
}

// Two pairs of endpoints that share a slot do not share a verdict.
func TestDeepCacheCollisions(t *testing.T) {
	var u manualUpstream
	g := newRig(t, Config{Upstreams: []Upstream{u.upstream("p")}, Rules: []Rule{mustRule(t, "src 10.0.0.2 drop")}}, nil)
	dst := netip.MustParseAddrPort("203.0.113.1:1000")
	var c deepCache
	one := netip.MustParseAddrPort("10.0.0.1:1")
	two := netip.AddrPort{}
	for port := uint16(1); port < 65535 && !two.IsValid(); port++ {
		if at := netip.AddrPortFrom(netip.MustParseAddr("10.0.0.2"), port); c.slot(at, dst) == c.slot(one, dst) {
			two = at
		}
	}
	if !two.IsValid() {
		t.Fatal("no two sources share a slot")
	}
	for range 2 {
		for _, src := range []netip.AddrPort{one, two} {
			g.HandlePackets([]flow.Packet{{Src: src, Dst: dst, Payload: []byte("x"), Head: make([]byte, 28)}})
		}
	}
	if s := g.Stats(); s.Dropped != 2 || s.Refused != 2 {
		t.Errorf("%d dropped, %d refused", s.Dropped, s.Refused)
	}
}

// apartUpstream keeps programs apart.
type apartUpstream struct{ *fakeUpstream }

func (apartUpstream) ByProgram() bool { return true }

// An upstream that keeps programs apart is told the program of each flow, although no rule asks for it.
func TestProgramsAreKeptApart(t *testing.T) {
	testkit.CheckLeaks(t)
	owners := &fakeOwners{}
	owners.set("10.0.0.1:1", flow.Owner{Known: true, UID: 7, Exe: "/usr/bin/curl"})
	owners.set("10.0.0.1:2", flow.Owner{Known: true, UID: 7, Exe: "/usr/bin/wget"})
	owners.set("10.0.0.1:3", flow.Owner{Known: true, UID: 8, Exe: "/usr/bin/curl"})
	owners.set("10.0.0.1:4", flow.Owner{Known: true, UID: 7, Exe: "/usr/bin/curl"})
	dialed := make(chan Dest, 1)
	up := &fakeUpstream{name: "p", dial: func(_ context.Context, d Dest, done func(int, error)) {
		dialed <- d
		go done(-1, context.Canceled)
	}}
	g := newRig(t, Config{Upstreams: []Upstream{apartUpstream{up}}, Owners: owners, Default: "p"}, nil)
	for i, want := range []string{"7 /usr/bin/curl", "7 /usr/bin/wget", "8 /usr/bin/curl", "7 /usr/bin/curl", ""} {
		req := newRequest(fmt.Sprintf("10.0.0.1:%d", i+1), "203.0.113.1:80")
		g.HandleStream(req)
		if d := <-dialed; d.Program != want {
			t.Errorf("flow %d is of %q, want %q", i+1, d.Program, want)
		}
		refusal(t, req)
	}
}

// A Tor with isolate=program is given a password of its own by each program.
func TestProgramsHaveTheirPassword(t *testing.T) {
	testkit.CheckLeaks(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	logins := make(chan string, 4)
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				close(logins)
				return
			}
			_ = c.SetDeadline(time.Now().Add(testkit.Patience))
			b := make([]byte, 512)
			_, _ = c.Read(b) // the methods
			_, _ = c.Write([]byte{5, 2})
			n, _ := c.Read(b) // RFC 1929
			logins <- string(b[:n])
			_, _ = c.Write([]byte{1, 1})
			_ = c.Close()
		}
	}()
	d, _ := newClient(t, "socks5://"+ln.Addr().String(), socks.Options{})
	s, err := socks.ParseServer("socks5://" + ln.Addr().String() + "?tor&isolate=program")
	if err != nil {
		t.Fatal(err)
	}
	owners := &fakeOwners{}
	for i, exe := range []string{"/usr/bin/curl", "/usr/bin/wget", "/usr/bin/curl"} {
		owners.set(fmt.Sprintf("10.0.0.1:%d", i+1), flow.Owner{Known: true, Exe: exe})
	}
	g := newRig(t, Config{Upstreams: []Upstream{NewSOCKS("p", d.Client(s))}, Owners: owners, Default: "p"}, nil)
	var got []string
	for i := range 3 {
		req := newRequest(fmt.Sprintf("10.0.0.1:%d", i+1), "203.0.113.1:80")
		g.HandleStream(req)
		got = append(got, <-logins)
		refusal(t, req)
	}
	if got[0] == got[1] || got[0] != got[2] || len(got[0]) < 32 {
		t.Errorf("the logins are %q", got)
	}
	_ = ln.Close()
	for range logins {
	}
}
