package hosttest

import (
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/testkit"
)

// dnsServer4 and dnsServer6 are the name server of the world.
const dnsServer4, dnsServer6 = "203.0.113.53", "2001:db8:f::53"

// pipelined is how many questions a TCP connection carries before the first answer is read.
const pipelined = 100

// A dnsProbe asks questions of one endpoint.
type dnsProbe struct {
	name      string
	to        netip.AddrPort
	tcp       bool
	bound     bool // the socket is bound to the uplink
	answering bool // the world's name server is there: it must answer when the proxy works
}

func (p dnsProbe) String() string {
	network := "udp"
	if p.tcp {
		network = "tcp"
	}
	return fmt.Sprintf("%s, %s %v", p.name, network, p.to)
}

// dnsProbes are all ways in which a program asks for names in the clear, and the ports of DNS over TLS and over QUIC.
func dnsProbes() (ps []dnsProbe) {
	for _, to := range []struct {
		name      string
		addresses []string
		port      uint16
		tcp       bool
	}{
		{"name server", []string{dnsServer4, dnsServer6}, 53, true},
		{"address without a server", []string{"203.0.113.54", "2001:db8:f::54"}, 53, true},
		{"router of the private network", []string{lanRouter4, lanRouter6}, 53, true},
		{"router of the public network", []string{router4, router6}, 53, true},
		{"link-local", []string{"169.254.7.7", routerLL}, 53, true},
		{"broadcast", []string{"255.255.255.255", "198.51.100.255"}, 53, false},
		{"multicast", []string{"224.0.0.251", "ff02::fb"}, 53, false},
		{"mDNS", []string{"224.0.0.251", "ff02::fb"}, 5353, false},
		{"LLMNR", []string{"224.0.0.252", "ff02::1:3"}, 5355, false},
		{"DNS over TLS, or QUIC", []string{dnsServer4, dnsServer6, router4, router6}, 853, true},
	} {
		for _, a := range to.addresses {
			p := dnsProbe{name: to.name, to: netipAddrPort(a, to.port), answering: to.name == "name server"}
			ps = append(ps, p)
			if to.tcp {
				p.tcp = true
				ps = append(ps, p)
			}
		}
	}
	for _, p := range ps[:4] { // those to the name server
		p.name, p.bound, p.answering = "name server, socket bound to the uplink", true, false
		ps = append(ps, p)
	}
	return ps
}

// dnsQuestions are messages that resolvers and programs send: every kind that is treated in a way of its own.
func dnsQuestions(tag string) (all [][]byte) {
	for i, q := range []struct {
		name   string
		typ    uint16
		opcode byte
	}{
		{"www." + tag + ".example.", 1, 0},
		{"www." + tag + ".example.", 28, 0},
		{"www." + tag + ".example.", 65, 0}, // HTTPS
		{tag + ".example.", 15, 0},
		{tag + ".example.", 16, 0},
		{tag + ".example.", 255, 0},
		{"7.113.0.203.in-addr.arpa.", 12, 0},
		{"1.0.77.10.in-addr.arpa.", 12, 0},
		{tag + ".", 1, 0},
		{tag + ".local.", 1, 0},
		{tag + ".onion.", 1, 0},
		{tag + ".home.arpa.", 1, 0},
		{tag + ".example.", 6, 5}, // UPDATE
		{tag + ".example.", 6, 4}, // NOTIFY
	} {
		b := []byte{0, byte(i + 1), 1 | q.opcode<<3, 0, 0, 1, 0, 0, 0, 0, 0, 0}
		for label := range strings.SplitSeq(q.name, ".") {
			b = append(append(b, byte(len(label))), label...)
		}
		all = append(all, append(b, byte(q.typ>>8), byte(q.typ), 0, 1))
	}
	return append(all, []byte("no question at all"))
}

// dnsAsker asks by sockets of the namespace under test.
type dnsAsker struct {
	t      testing.TB
	open   func(family, typ int) (int, error) // a non-blocking socket there
	uplink string                             // the device by which that namespace reaches others
}

// socket gives one as p needs it, and the address to send to; the caller closes it.
func (a *dnsAsker) socket(p dnsProbe) (fd int, to unix.Sockaddr, err error) {
	family, typ := unix.AF_INET, unix.SOCK_DGRAM
	if p.to.Addr().Is6() {
		family = unix.AF_INET6
	}
	if p.tcp {
		typ = unix.SOCK_STREAM
	}
	if fd, err = a.open(family, typ); err != nil {
		return -1, nil, err
	}
	index := 0
	if ifr, err := unix.NewIfreq(a.uplink); err == nil && unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, ifr) == nil {
		index = int(ifr.Uint32())
	}
	if index == 0 {
		unix.Close(fd)
		return -1, nil, fmt.Errorf("there is no device %s", a.uplink)
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BROADCAST, 1)
	if p.bound {
		err = unix.BindToDevice(fd, a.uplink)
	}
	to = sockaddr(p.to)
	switch sa := to.(type) {
	case *unix.SockaddrInet4:
		if p.to.Addr().IsMulticast() {
			err = unix.SetsockoptIPMreqn(fd, unix.IPPROTO_IP, unix.IP_MULTICAST_IF, &unix.IPMreqn{Ifindex: int32(index)})
		}
	case *unix.SockaddrInet6:
		if p.to.Addr().IsLinkLocalUnicast() || p.to.Addr().IsMulticast() {
			sa.ZoneId = uint32(index)
		}
	}
	if err != nil {
		unix.Close(fd)
		return -1, nil, err
	}
	return fd, to, nil
}

// answers is how many answers a program expects.
func (p dnsProbe) answers() int {
	if p.tcp {
		return pipelined
	}
	return len(dnsQuestions("count")) - 1
}

// ask sends all questions by one socket and gives how many different answers came before the deadline; it waits for no more
// than enough of them.
func (a *dnsAsker) ask(p dnsProbe, questions [][]byte, enough int, deadline time.Time) (answers int, err error) {
	fd, to, err := a.socket(p)
	if err != nil {
		return 0, err
	}
	if p.tcp {
		err = connectBy(fd, to, deadline)
	} else {
		for _, q := range questions {
			if e := unix.Sendto(fd, q, 0, to); e != nil {
				err = e
			}
		}
	}
	f := os.NewFile(uintptr(fd), "asker")
	defer f.Close()
	if err != nil {
		return 0, err
	}
	_ = f.SetDeadline(deadline)
	if p.tcp {
		return askPipelined(f, questions)
	}
	seen := map[uint16]bool{}
	for b := make([]byte, 65536); len(seen) < enough; {
		n, err := f.Read(b)
		if err != nil {
			break
		}
		if n >= 12 && b[2]&0x80 != 0 {
			seen[binary.BigEndian.Uint16(b)] = true
		}
	}
	return len(seen), nil
}

// connectBy ends a connect of a non-blocking socket.
func connectBy(fd int, to unix.Sockaddr, deadline time.Time) error {
	if err := unix.Connect(fd, to); err != unix.EINPROGRESS {
		return err
	}
	for time.Now().Before(deadline) {
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		if n, _ := unix.Poll(poll, 50); n > 0 {
			if errno, _ := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); errno != 0 {
				return unix.Errno(errno)
			}
			return nil
		}
	}
	return unix.ETIMEDOUT
}

// askPipelined writes the well-formed questions again and again, pipelined in all, and counts the answers.
func askPipelined(c io.ReadWriter, questions [][]byte) (answers int, err error) {
	var out []byte
	wellFormed := questions[:len(questions)-1]
	for i := range pipelined {
		q := wellFormed[i%len(wellFormed)]
		out = binary.BigEndian.AppendUint16(out, uint16(len(q)))
		out = append(out, q...)
		binary.BigEndian.PutUint16(out[len(out)-len(q):], uint16(i))
	}
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(out)
		sent <- err
	}()
	seen := map[uint16]bool{}
	for len(seen) < pipelined {
		m, err := readDNS(c)
		if err != nil || len(m) < 12 {
			break
		}
		seen[binary.BigEndian.Uint16(m)] = true
	}
	if len(seen) == pipelined {
		err = <-sent
	}
	return len(seen), err
}

func readDNS(r io.Reader) ([]byte, error) {
	var n [2]byte
	if _, err := io.ReadFull(r, n[:]); err != nil {
		return nil, err
	}
	m := make([]byte, binary.BigEndian.Uint16(n[:]))
	_, err := io.ReadFull(r, m)
	return m, err
}

// fire asks by all probes at once for so long, or if there will be answers until they have come.
func (a *dnsAsker) fire(phase string, d time.Duration, answered bool) []int {
	a.t.Helper()
	var wg sync.WaitGroup
	ps := dnsProbes()
	answers := make([]int, len(ps))
	questions := dnsQuestions(phase)
	for i, p := range ps {
		enough, deadline := math.MaxInt, time.Now().Add(d)
		if answered && p.answering {
			enough, deadline = p.answers(), time.Now().Add(testkit.Patience)
		}
		wg.Go(func() {
			// An error is what a program sees of a refusal: no matter here.
			answers[i], _ = a.ask(p, questions, enough, deadline)
		})
	}
	wg.Wait()
	return answers
}

// answerDNS is an answer without records to a message, if that has a question.
func answerDNS(q []byte) []byte {
	end := 12
	for end < len(q) && q[end] != 0 {
		end += 1 + int(q[end])
	}
	if end += 5; end > len(q) {
		return nil
	}
	a := append([]byte(nil), q[:end]...)
	a[2] |= 0x80
	for i := 6; i < 12; i++ {
		a[i] = 0
	}
	return a
}

// nameServer answers by UDP and TCP in the world.
func (w *world) nameServer() {
	w.t.Helper()
	w.ip("world", "addr add "+dnsServer6+"/128 dev lo nodad")
	for _, host := range []string{dnsServer4, dnsServer6} {
		at := net.JoinHostPort(host, "53")
		u := w.packets("world", at)
		go func() {
			b := make([]byte, 65536)
			for n, from, err := u.ReadFrom(b); err == nil; n, from, err = u.ReadFrom(b) {
				if a := answerDNS(b[:n]); a != nil {
					_, _ = u.WriteTo(a, from)
				}
			}
		}()
		serve(w.listen("world", at), func(c net.Conn) {
			for q, err := readDNS(c); err == nil; q, err = readDNS(c) {
				a := answerDNS(q)
				if _, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(a))), a...)); err != nil {
					return
				}
			}
		})
	}
}

// dnsModes are the values of --dns; answers: the world's name server is asked in the end, and so all is answered.
var dnsModes = []struct {
	value   string
	answers bool
}{
	{"fake,tcp://" + dnsServer4, true},
	{"tcp://" + dnsServer4 + ",[" + dnsServer6 + "]", true},
	{"fake,tls://" + dnsServer4, false},
	{"tls://" + dnsServer4, false},
	{"https://" + dnsServer4 + "/dns-query", false},
	{"https://dns.example/dns-query", false},
	{"relay", true},
	{"off", true},
}

// proxyStates are what becomes of the proxy, in this order: the last closes it.
var proxyStates = []struct {
	name string
	make func(*sockstest.Server)
}{
	{"works", func(*sockstest.Server) {}},
	{"refuses", func(s *sockstest.Server) {
		s.SetFault(func(sockstest.Request) sockstest.Fault { return sockstest.Reply(2) })
	}},
	{"hangs", func(s *sockstest.Server) {
		s.SetFault(func(sockstest.Request) sockstest.Fault { return sockstest.Silence() })
		s.CutAll(sockstest.RST)
	}},
	{"down", func(s *sockstest.Server) { _ = s.Close() }},
}

// dnsPhase is how long each phase lasts: a SYN is sent again after a second.
const dnsPhase = 1300 * time.Millisecond

// eachDNSMode runs start, which starts a viasocks with these flags and gives who asks through it, in all modes and with a
// proxy in all states, while the recorder watches.
func eachDNSMode(t *testing.T, start func(w *world, flags ...string) (a *dnsAsker, stop func())) {
	w := newWorld(t)
	rec := newRecorder(w)
	w.nameServer()
	host := &dnsAsker{t: t, uplink: "eth0", open: openInHost}
	host.fire("control", dnsPhase/2, false)
	testkit.Settle(100*time.Millisecond, "what leaves has left")
	control := map[endpoint]bool{}
	for _, s := range rec.take() {
		control[endpoint{s.what.proto, s.what.dst, s.what.dport}] = true
	}
	for _, p := range dnsProbes() {
		e := endpoint{unix.IPPROTO_UDP, p.to.Addr(), p.to.Port()}
		if p.tcp {
			e.proto = unix.IPPROTO_TCP
		}
		if !control[e] && p.to.Addr() != netip.MustParseAddr("169.254.7.7") { // nobody answers ARP for it
			t.Errorf("control: %v is not seen without viasocks: its test would prove nothing", p)
		}
	}
	for _, mode := range dnsModes {
		name := strings.NewReplacer("://", "=", "/", "_").Replace(mode.value)
		t.Run(name, func(t *testing.T) {
			w := &world{t: t}
			if out, err := w.command("check", "--proxy", "socks5://"+proxy4, "--dns", mode.value); err != nil {
				t.Fatalf("viasocks takes no --dns %s: %s", mode.value, out)
			}
			proxy := w.proxy(proxy4 + ":1080")
			rec.known(proxy)
			a, stop := start(w, "--proxy", "socks5://"+proxy4+":1080", "--dns", mode.value)
			defer stop()
			rec.take() // what was there before the start
			for i, state := range proxyStates {
				state.make(proxy)
				answered := state.name == "works" && mode.answers
				answers := a.fire(fmt.Sprintf("phase%d", i), dnsPhase, answered)
				rec.noneLeft(t, state.name)
				if answered {
					a.checkAnswers(answers)
				}
			}
		})
	}
}

// noneLeft reports frames that left for another place than the proxy.
func (r *recorder) noneLeft(t *testing.T, state string) {
	t.Helper()
	seen := r.take()
	for i, s := range seen {
		if i == 5 {
			t.Errorf("and %d more", len(seen)-i)
			break
		}
		t.Errorf("while the proxy %s this left the host: %v", state, s.what)
	}
}

// checkAnswers holds what came to what a program expects: each question that is one has an answer.
func (a *dnsAsker) checkAnswers(answers []int) {
	a.t.Helper()
	for i, p := range dnsProbes() {
		if p.answering && answers[i] < p.answers() {
			a.t.Errorf("%v: %d answers to %d questions", p, answers[i], p.answers())
		}
	}
}

func openInHost(family, typ int) (fd int, err error) {
	err = in("host", func() (err error) {
		fd, err = unix.Socket(family, typ|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		return err
	})
	return fd, err
}

// TestDNSLeakUp: whatever the whole host asks, by whatever way, no question leaves it but to the proxy.
func TestDNSLeakUp(t *testing.T) {
	if !apart(t) {
		return
	}
	eachDNSMode(t, func(w *world, flags ...string) (*dnsAsker, func()) {
		d := w.up(flags...)
		return &dnsAsker{t: w.t, uplink: "eth0", open: openInHost}, func() {
			if err := d.stop(); err != nil {
				w.t.Error(err)
			}
		}
	})
}

// TestDNSLeakRun is the same for one program. Its namespace has no other device than ours.
func TestDNSLeakRun(t *testing.T) {
	if !apart(t) {
		return
	}
	eachDNSMode(t, func(w *world, flags ...string) (*dnsAsker, func()) {
		agent, _ := w.runAgent(flags...)
		var mu sync.Mutex // one request to the agent at a time
		return &dnsAsker{t: w.t, uplink: "tun0", open: func(family, typ int) (int, error) {
			mu.Lock()
			defer mu.Unlock()
			return agent.socket(family, typ)
		}}, func() {}
	})
}
