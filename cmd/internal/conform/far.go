package conform

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Limits of a far end.
const (
	farLine    = 192              // bytes of a command
	farLife    = 30 * time.Second // of one connection
	farConns   = 256              // open connections; further ones are closed at once
	farRecords = 1024             // tokens; older ones are dropped
	farAnswer  = 20_000           // bytes of the answer to a half-close
	recordWait = 3 * time.Second  // wait for the end of the connection in question
)

// farHello is what the far end sends first on each connection.
const farHello = "viasocks far end 1\n"

// FarEnd is the peer behind the server. It listens for TCP on the first address, and for UDP on two ports of both;
// the second address need only be different. It answers every client, and its answers to datagrams can be larger than
// the questions, so it is only for hosts that nobody but the tests can reach.
//
// A connection begins with its greeting; then it takes one line:
//
//	echo          sends back what comes
//	count         reads to the FIN, then says how much came and sends 20,000 bytes
//	fin TOKEN     sends FIN at once, reads on, and records how the connection ended
//	reset         sends 1,000 bytes, then RST
//	record TOKEN  reads, and records how the connection ended
//	result TOKEN  says what was recorded
//	dial PORT     connects to that port of the host that asks, says from where, and sends back what comes there
//
// A FarEnd made by Serve has these commands instead of dial, and answers only the datagrams of a session:
//
//	session       says "TOKEN PORT PORT2 CLOSED ADDRESSES SEEN": the token of datagrams, the ports of UDP, a port that
//	              refuses TCP, how many addresses there are, and who asks
//	pour N        sends N bytes, for two seconds at most
type FarEnd struct {
	guard      *guard // nil: it is for hosts that only the tests reach
	closed     int    // a descriptor that keeps closedPort; negative: none
	closedPort uint16
	ports      [2]uint16
	addresses  int

	tcp []net.Listener
	udp [2][2]*net.UDPConn
	all []*net.UDPConn // these, and those of further addresses

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	slots  chan struct{}

	mu      sync.Mutex
	records map[string]string
	order   []string
}

// ListenFar starts a far end on first and second, which are different addresses of this host and of one family, and
// for TCP and UDP also on more. If port is 0, the kernel chooses the ports; otherwise TCP has port, and UDP has port
// and port+1. Close ends it.
func ListenFar(port uint16, first, second netip.Addr, more ...netip.Addr) (*FarEnd, error) {
	f := &FarEnd{slots: make(chan struct{}, farConns), records: map[string]string{}, closed: -1}
	f.ctx, f.cancel = context.WithCancel(context.Background())
	if err := f.listen(port, first, second, more); err != nil {
		f.Close()
		return nil, fmt.Errorf("cannot start the far end: %w", err)
	}
	for _, ln := range f.tcp {
		f.wg.Go(func() { f.accept(ln) })
	}
	for _, u := range f.all {
		f.wg.Go(func() { f.answerUDP(u) })
	}
	return f, nil
}

func (f *FarEnd) listen(port uint16, first, second netip.Addr, more []netip.Addr) error {
	for _, a := range append([]netip.Addr{first}, more...) {
		ln, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(a, port)))
		if err != nil {
			return err
		}
		f.tcp = append(f.tcp, ln)
	}
	for i, a := range []netip.Addr{first, second} {
		for j := range 2 {
			at := port
			if port != 0 {
				at += uint16(j)
			}
			u, err := f.listenUDP(netip.AddrPortFrom(a, at))
			if err != nil {
				return err
			}
			f.udp[i][j] = u
		}
	}
	for _, a := range more {
		if _, err := f.listenUDP(netip.AddrPortFrom(a, port)); err != nil {
			return err
		}
	}
	return nil
}

// TCP returns where the far end listens on its first address.
func (f *FarEnd) TCP() netip.AddrPort { return f.tcp[0].Addr().(*net.TCPAddr).AddrPort() }

// UDP returns the addresses of the far end's datagram sockets: by address, then by port.
func (f *FarEnd) UDP() (at [2][2]netip.AddrPort) {
	for i := range f.udp {
		for j, u := range f.udp[i] {
			at[i][j] = u.LocalAddr().(*net.UDPAddr).AddrPort()
		}
	}
	return at
}

// Close ends all connections and waits for the goroutines. It may be called twice.
func (f *FarEnd) Close() error {
	f.cancel()
	for _, ln := range f.tcp {
		ln.Close()
	}
	for _, u := range f.all {
		u.Close()
	}
	f.wg.Wait()
	if f.closed >= 0 {
		unix.Close(f.closed)
		f.closed = -1
	}
	return nil
}

func (f *FarEnd) accept(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			time.Sleep(10 * time.Millisecond) // out of descriptors
			continue
		}
		select {
		case f.slots <- struct{}{}:
		default:
			c.Close()
			continue
		}
		client := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
		if f.guard != nil && !f.guard.enter(client) {
			c.Close()
			<-f.slots
			continue
		}
		f.wg.Go(func() {
			defer func() {
				if f.guard != nil {
					f.guard.leave(client)
				}
				<-f.slots
			}()
			defer c.Close()
			defer context.AfterFunc(f.ctx, func() { c.Close() })()
			f.serve(c.(*net.TCPConn))
		})
	}
}

func (f *FarEnd) serve(c *net.TCPConn) {
	c.SetDeadline(time.Now().Add(farLife))
	if _, err := io.WriteString(c, farHello); err != nil {
		return
	}
	line, err := readLine(c)
	if err != nil {
		return
	}
	command, arg, _ := strings.Cut(line, " ")
	switch command {
	case "echo":
		io.Copy(c, c)
		c.CloseWrite()
	case "count":
		n, err := io.Copy(io.Discard, c)
		if err != nil {
			return
		}
		time.Sleep(200 * time.Millisecond) // a server that ends both directions at the first FIN has done so by now
		fmt.Fprintf(c, "%d\n", n)
		c.Write(make([]byte, farAnswer))
	case "fin":
		c.CloseWrite()
		f.record(arg, c)
	case "reset":
		c.Write(make([]byte, 1000))
		time.Sleep(200 * time.Millisecond) // until they are acknowledged, because RST discards what is queued
		c.SetLinger(0)
	case "record":
		f.record(arg, c)
	case "result":
		fmt.Fprintf(c, "%s\n", f.result(arg))
	case "dial":
		if f.guard == nil {
			f.dialBack(c, arg)
		}
	case "session":
		f.serveSession(c)
	case "pour":
		n, _ := strconv.Atoi(arg)
		f.servePour(c, n)
	}
}

// record reads to the end of c and stores how it ended: "fin N", "reset N" or "open N" with the number of bytes.
func (f *FarEnd) record(token string, c net.Conn) {
	n, err := io.Copy(io.Discard, c)
	how := "open"
	switch {
	case err == nil:
		how = "fin"
	case errors.Is(err, syscall.ECONNRESET):
		how = "reset"
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.order) >= farRecords {
		delete(f.records, f.order[0])
		f.order = f.order[1:]
	}
	f.records[token] = fmt.Sprint(how, " ", n)
	f.order = append(f.order, token)
}

// result waits for what record stores. It returns "open" if the connection has not ended.
func (f *FarEnd) result(token string) string {
	for end := time.Now().Add(recordWait); ; time.Sleep(20 * time.Millisecond) {
		f.mu.Lock()
		how, ok := f.records[token]
		f.mu.Unlock()
		if ok {
			return how
		}
		if time.Now().After(end) || f.ctx.Err() != nil {
			return "open 0"
		}
	}
}

// dialBack connects to a port of the host at the other end of c.
func (f *FarEnd) dialBack(c *net.TCPConn, arg string) {
	port, err := strconv.ParseUint(arg, 10, 16)
	if err != nil {
		return
	}
	host := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr()
	d := net.Dialer{Timeout: recordWait, LocalAddr: &net.TCPAddr{IP: c.LocalAddr().(*net.TCPAddr).IP}}
	back, err := d.DialContext(f.ctx, "tcp", netip.AddrPortFrom(host, uint16(port)).String())
	if err != nil {
		fmt.Fprintf(c, "failed %v\n", err)
		return
	}
	defer back.Close()
	defer context.AfterFunc(f.ctx, func() { back.Close() })()
	back.SetDeadline(time.Now().Add(farLife))
	fmt.Fprintf(c, "%v\n", back.LocalAddr())
	io.Copy(back, back)
}

// readLine reads to the next newline, byte by byte, and at most farLine bytes.
func readLine(r io.Reader) (string, error) {
	b := bufio.NewReaderSize(io.LimitReader(oneByte{r}, farLine), farLine)
	line, err := b.ReadString('\n')
	return strings.TrimSuffix(line, "\n"), err
}

// oneByte returns one byte at each read, so that a reader on top of it takes nothing in advance.
type oneByte struct{ r io.Reader }

func (o oneByte) Read(b []byte) (int, error) { return o.r.Read(b[:1]) }
