package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"unsafe"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// This file implements nfnetlink itself and uses the expressions of google/nftables: that library writes zeros for a
// table's flags, and an owned table accepts messages from one socket only.

// Flags of a table (linux/netfilter/nf_tables.h). An owned table survives `nft flush ruleset` and deletion by others.
// With persist (Linux 6.9) it survives its owner, too.
const (
	tableOwner   = 0x2
	tablePersist = 0x4
)

// nfMsg is one message of a batch.
type nfMsg struct {
	op    uint16 // NFT_MSG_*
	fam   uint8
	flags uint16
	attrs []byte
	text  string // for errors
	needs []*need
}

// nfSocket is a connection to the nftables of the network namespace in which it was opened.
type nfSocket struct {
	mu   sync.Mutex
	conn nfConn // nil: closed
	pid  uint32 // the sender that the kernel names in notifications of our changes
	seq  uint32
	buf  []byte
}

// nfConn is a netlink socket. The answers to a message are available when Send returns.
type nfConn interface {
	Send(b []byte) error
	Receive(b []byte, flags int) (int, error)
	Close() error
}

type nfFD int

func (c nfFD) Send(b []byte) error {
	return unix.Sendto(int(c), b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
}

func (c nfFD) Receive(b []byte, flags int) (int, error) {
	n, _, err := unix.Recvfrom(int(c), b, flags)
	return n, err
}

func (c nfFD) Close() error { return unix.Close(int(c)) }

// openNF is a variable so that tests can simulate a kernel that lacks something.
var openNF = func() (*nfSocket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, err
	}
	s := &nfSocket{conn: nfFD(fd), buf: make([]byte, 64<<10)}
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4<<20)
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 4<<20)
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1)
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		unix.Close(fd)
		return nil, err
	}
	if sa, err := unix.Getsockname(fd); err == nil {
		if nl, ok := sa.(*unix.SockaddrNetlink); ok {
			s.pid = nl.Pid
		}
	}
	return s, nil
}

func (s *nfSocket) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn == nil {
		return nil
	}
	c := s.conn
	s.conn = nil
	return c.Close()
}

// nfError tells which message of a batch failed.
type nfError struct {
	index int // -1: the batch itself
	text  string
	err   error
}

func (e *nfError) Error() string { return fmt.Sprintf("%s: %v", e.text, e.err) }
func (e *nfError) Unwrap() error { return e.err }

func header(b []byte, typ, flags uint16, seq uint32, fam uint8, res uint16) []byte {
	start := len(b)
	b = append(b, make([]byte, unix.NLMSG_HDRLEN)...)
	h := (*unix.NlMsghdr)(unsafe.Pointer(&b[start]))
	h.Type, h.Flags, h.Seq = typ, flags, seq
	return append(b, fam, unix.NFNETLINK_V0, byte(res>>8), byte(res))
}

func setLen(b []byte, start int) {
	(*unix.NlMsghdr)(unsafe.Pointer(&b[start])).Len = uint32(len(b) - start)
}

// batch applies all of msgs or none. The kernel answers before the system call ends.
func (s *nfSocket) batch(msgs []nfMsg) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn == nil {
		return os.ErrClosed
	}
	first := s.seq + 1
	var b []byte
	b = header(b, unix.NFNL_MSG_BATCH_BEGIN, unix.NLM_F_REQUEST, first, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)
	setLen(b, 0)
	for i, m := range msgs {
		start := len(b)
		flags := m.flags | unix.NLM_F_REQUEST
		if i == len(msgs)-1 {
			flags |= unix.NLM_F_ACK
		}
		b = header(b, unix.NFNL_SUBSYS_NFTABLES<<8|m.op, flags, first+1+uint32(i), m.fam, 0)
		b = append(b, m.attrs...)
		setLen(b, start)
	}
	start := len(b)
	s.seq = first + 1 + uint32(len(msgs))
	b = header(b, unix.NFNL_MSG_BATCH_END, unix.NLM_F_REQUEST, s.seq, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)
	setLen(b, start)
	if err := s.conn.Send(b); err != nil {
		return fmt.Errorf("cannot send to nftables: %w", err)
	}
	acked := false
	var failed *nfError
	err := s.receive(unix.MSG_DONTWAIT, func(h unix.NlMsghdr, data []byte) bool {
		if h.Type != unix.NLMSG_ERROR || len(data) < 4 || h.Seq < first || h.Seq > s.seq {
			return true
		}
		i := int(h.Seq-first) - 1
		errno := unix.Errno(-int32(binary.NativeEndian.Uint32(data)))
		switch {
		case errno == 0:
			acked = acked || i == len(msgs)-1
		case failed == nil:
			failed = &nfError{index: i, err: errno, text: "nftables"}
			if i >= 0 && i < len(msgs) {
				failed.text = msgs[i].text
			}
		}
		return true
	})
	switch {
	case failed != nil:
		return failed
	case err != nil && !errors.Is(err, unix.EAGAIN):
		return fmt.Errorf("cannot subscribe to nftables: %w", err)
	case !acked:
		return errors.New("nftables did not answer")
	}
	return nil
}

// dump requests all objects of a kind.
func (s *nfSocket) dump(op uint16, fam uint8, attrs []byte, f func(fam uint8, attrs []byte)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn == nil {
		return os.ErrClosed
	}
	s.seq++
	b := header(nil, unix.NFNL_SUBSYS_NFTABLES<<8|op, unix.NLM_F_REQUEST|unix.NLM_F_DUMP, s.seq, fam, 0)
	b = append(b, attrs...)
	setLen(b, 0)
	if err := s.conn.Send(b); err != nil {
		return err
	}
	var failed error
	err := s.receive(0, func(h unix.NlMsghdr, data []byte) bool {
		switch {
		case h.Seq != s.seq:
		case h.Type == unix.NLMSG_DONE && len(data) < 4:
			return false
		case h.Type == unix.NLMSG_DONE || h.Type == unix.NLMSG_ERROR && len(data) >= 4: // both contain the result
			if errno := unix.Errno(-int32(binary.NativeEndian.Uint32(data))); errno != 0 {
				failed = errno
			}
			return false
		case len(data) >= 4:
			f(data[0], data[4:])
		}
		return true
	})
	return errors.Join(err, failed)
}

// receive calls f for each message until f returns false or there is an error.
func (s *nfSocket) receive(flags int, f func(unix.NlMsghdr, []byte) bool) error {
	for {
		n, err := s.conn.Receive(s.buf, flags)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if !eachMessage(s.buf[:n], f) {
			return nil
		}
	}
}

func eachMessage(b []byte, f func(unix.NlMsghdr, []byte) bool) bool {
	for len(b) >= unix.NLMSG_HDRLEN {
		h := *(*unix.NlMsghdr)(unsafe.Pointer(&b[0]))
		if h.Len < unix.NLMSG_HDRLEN || int(h.Len) > len(b) {
			return true
		}
		if !f(h, b[unix.NLMSG_HDRLEN:h.Len]) {
			return false
		}
		b = b[min(len(b), int(h.Len+3)&^3):]
	}
	return true
}

// attr encodes one netlink attribute.
func attr(typ uint16, data []byte) []byte {
	n := 4 + len(data)
	b := make([]byte, 0, (n+3)&^3)
	b = binary.NativeEndian.AppendUint16(b, uint16(n))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = append(b, data...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func nested(typ uint16, parts ...[]byte) []byte { return attr(typ|unix.NLA_F_NESTED, cat(parts...)) }
func attrString(typ uint16, s string) []byte    { return attr(typ, append([]byte(s), 0)) }
func attrU32(typ uint16, v uint32) []byte       { return attr(typ, binary.BigEndian.AppendUint32(nil, v)) }
func attrU64(typ uint16, v uint64) []byte       { return attr(typ, binary.BigEndian.AppendUint64(nil, v)) }

func cat(parts ...[]byte) (b []byte) {
	for _, p := range parts {
		b = append(b, p...)
	}
	return b
}

// attrs decodes attributes and skips malformed ones.
func attrs(b []byte) map[uint16][]byte {
	m := map[uint16][]byte{}
	eachAttr(b, func(typ uint16, data []byte) { m[typ] = data })
	return m
}

// eachAttr calls f for each attribute. It is for lists whose members have the same type.
func eachAttr(b []byte, f func(typ uint16, data []byte)) {
	for len(b) >= 4 {
		n := int(binary.NativeEndian.Uint16(b))
		if n < 4 || n > len(b) {
			return
		}
		f(binary.NativeEndian.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[4:n])
		b = b[min(len(b), (n+3)&^3):]
	}
}

func cstring(b []byte) string {
	for i, c := range b {
		if c == 0 {
			return string(b[:i])
		}
	}
	return string(b)
}

// encodeExprs encodes the list of a rule's expressions.
func encodeExprs(fam uint8, es []expr.Any) ([]byte, error) {
	var list []byte
	for _, e := range es {
		b, err := expr.Marshal(fam, e)
		if err != nil {
			return nil, err
		}
		list = append(list, attr(unix.NFTA_LIST_ELEM|unix.NLA_F_NESTED, b)...)
	}
	return list, nil
}
