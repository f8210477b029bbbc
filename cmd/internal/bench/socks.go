package main

import (
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"time"
)

// The commands of SOCKS5.
const (
	cmdConnect = 1
	cmdBind    = 2
	cmdUDP     = 3
)

// socksMain is a SOCKS5 server without authentication. Bulk data moves by splice(2).
func socksMain(args []string) error {
	fs := flag.NewFlagSet("socks", flag.ExitOnError)
	listen := fs.String("listen", "", "address and port")
	names := fs.String("names", "", "the address that every name stands for; empty: names are refused")
	fs.Parse(args)
	var named netip.Addr
	if *names != "" {
		var err error
		if named, err = netip.ParseAddr(*names); err != nil {
			return err
		}
	}
	l, err := net.Listen("tcp", *listen)
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			_ = serveSOCKS(c.(*net.TCPConn), named)
		}()
	}
}

// serveSOCKS serves one client. named is the address that all names stand for.
func serveSOCKS(c *net.TCPConn, named netip.Addr) error {
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	var b [262]byte
	if _, err := io.ReadFull(c, b[:2]); err != nil {
		return err
	}
	if _, err := io.ReadFull(c, b[2:2+int(b[1])]); err != nil {
		return err
	}
	if _, err := c.Write([]byte{5, 0}); err != nil {
		return err
	}
	if _, err := io.ReadFull(c, b[:4]); err != nil {
		return err
	}
	dst, err := readAddr(c, b[3], named)
	if err != nil {
		return err
	}
	_ = c.SetDeadline(time.Time{})
	switch b[1] {
	case cmdConnect:
		return serveConnect(c, dst)
	case cmdBind:
		return serveBind(c, dst.Port())
	case cmdUDP:
		return serveAssociate(c)
	}
	return fmt.Errorf("command %d", b[1])
}

func readAddr(r io.Reader, atyp byte, named netip.Addr) (netip.AddrPort, error) {
	var b [257]byte
	if atyp == 3 && named.IsValid() {
		if _, err := io.ReadFull(r, b[:1]); err != nil {
			return netip.AddrPort{}, err
		}
		n := int(b[0]) + 2
		_, err := io.ReadFull(r, b[:n])
		return netip.AddrPortFrom(named, binary.BigEndian.Uint16(b[n-2:])), err
	}
	n := 6
	if atyp == 4 {
		n = 18
	} else if atyp != 1 {
		return netip.AddrPort{}, fmt.Errorf("address type %d", atyp)
	}
	if _, err := io.ReadFull(r, b[:n]); err != nil {
		return netip.AddrPort{}, err
	}
	ip, _ := netip.AddrFromSlice(b[:n-2])
	return netip.AddrPortFrom(ip, binary.BigEndian.Uint16(b[n-2:])), nil
}

func reply(code byte, a netip.AddrPort) []byte {
	if !a.IsValid() {
		a = netip.AddrPortFrom(netip.IPv4Unspecified(), 0)
	}
	b := []byte{5, code, 0, 1}
	if a.Addr().Is6() {
		b[3] = 4
	}
	b = append(b, a.Addr().AsSlice()...)
	return binary.BigEndian.AppendUint16(b, a.Port())
}

func serveConnect(c *net.TCPConn, dst netip.AddrPort) error {
	d, err := net.DialTimeout("tcp", dst.String(), 10*time.Second)
	if err != nil {
		_, err = c.Write(reply(5, netip.AddrPort{}))
		return err
	}
	defer d.Close()
	if _, err := c.Write(reply(0, netip.AddrPort{})); err != nil {
		return err
	}
	return spliceBoth(c, d.(*net.TCPConn))
}

// serveBind lets one peer in. The next BIND gets the same port, also while the connection is open.
func serveBind(c *net.TCPConn, port uint16) error {
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{Port: int(port)})
	// The BIND of a client that has just ended may still have the port.
	for end := time.Now().Add(time.Second); err != nil && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
		l, err = net.ListenTCP("tcp4", &net.TCPAddr{Port: int(port)})
	}
	if err != nil {
		_, err = c.Write(reply(1, netip.AddrPort{}))
		return err
	}
	defer l.Close()
	if _, err := c.Write(reply(0, l.Addr().(*net.TCPAddr).AddrPort())); err != nil {
		return err
	}
	// The client says nothing until a peer has come; what ends this read before that is the end of the client.
	waited := make(chan struct{})
	go func() {
		defer close(waited)
		_, err := c.Read(make([]byte, 1))
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			l.Close()
		}
	}()
	far, err := l.AcceptTCP()
	_ = c.SetReadDeadline(time.Now())
	<-waited
	if err != nil {
		return err
	}
	defer far.Close()
	l.Close()
	_ = c.SetDeadline(time.Time{})
	if _, err := c.Write(reply(0, far.RemoteAddr().(*net.TCPAddr).AddrPort())); err != nil {
		return err
	}
	return spliceBoth(c, far)
}

// spliceBoth relays in both directions until both have ended.
func spliceBoth(c, far *net.TCPConn) error {
	up := make(chan error, 1)
	go func() {
		err := spliceAll(far, c)
		_ = far.CloseWrite()
		up <- err
	}()
	err := spliceAll(c, far)
	_ = c.CloseWrite()
	return errors.Join(err, <-up)
}

// serveAssociate relays datagrams until the control connection ends. One socket faces both sides: the client is the
// first sender from the control connection's address.
func serveAssociate(c *net.TCPConn) error {
	local := c.LocalAddr().(*net.TCPAddr)
	toClient, err := net.ListenUDP("udp", &net.UDPAddr{IP: local.IP})
	if err != nil {
		return err
	}
	defer toClient.Close()
	toWorld, err := net.ListenUDP("udp", nil)
	if err != nil {
		return err
	}
	defer toWorld.Close()
	for _, u := range []*net.UDPConn{toClient, toWorld} {
		_ = u.SetReadBuffer(4 << 20)
		_ = u.SetWriteBuffer(4 << 20)
	}
	if _, err := c.Write(reply(0, toClient.LocalAddr().(*net.UDPAddr).AddrPort())); err != nil {
		return err
	}
	client := make(chan netip.AddrPort, 1)
	go relayUp(toClient, toWorld, client)
	go relayDown(toClient, toWorld, client)
	_, _ = io.Copy(io.Discard, c)
	return nil
}

func relayUp(toClient, toWorld *net.UDPConn, client chan<- netip.AddrPort) {
	defer close(client)
	b := make([]byte, 65536)
	for first := true; ; {
		n, from, err := toClient.ReadFromUDPAddrPort(b)
		if err != nil {
			return
		}
		if first {
			client <- from
			first = false
		}
		head, addr := 10, 4
		if n > 3 && b[3] == 4 {
			head, addr = 22, 16
		}
		if n < head {
			continue
		}
		ip, _ := netip.AddrFromSlice(b[4 : 4+addr])
		_, _ = toWorld.WriteToUDPAddrPort(b[head:n], netip.AddrPortFrom(ip, binary.BigEndian.Uint16(b[4+addr:])))
	}
}

func relayDown(toClient, toWorld *net.UDPConn, client <-chan netip.AddrPort) {
	to, ok := <-client
	if !ok {
		return
	}
	b := make([]byte, 65536)
	for {
		n, from, err := toWorld.ReadFromUDPAddrPort(b[22:])
		if err != nil {
			return
		}
		ip := from.Addr().Unmap()
		head := 22 - 6 - ip.BitLen()/8
		b[head], b[head+1], b[head+2], b[head+3] = 0, 0, 0, 1
		if ip.Is6() {
			b[head+3] = 4
		}
		copy(b[head+4:], ip.AsSlice())
		binary.BigEndian.PutUint16(b[20:], from.Port())
		_, _ = toClient.WriteToUDPAddrPort(b[head:22+n], to)
	}
}
