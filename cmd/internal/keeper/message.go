package keeper

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/route/kernel"
	"github.com/viasocks/viasocks/tun/netns"
)

// The two processes exchange JSON messages over a pair of sockets that keeps their bounds (SOCK_SEQPACKET). Each request
// has one answer, except a beat, which has none. The files of an answer are the queues of the TUN and a sock_diag
// socket.

// op is what a request asks for.
type op string

// The requests, in the order of a life.
const (
	opOpen  op = "open"  // close the namespace, and make the TUN or take the one that is there
	opSteer op = "steer" // send the programs' packets into the TUN
	opBeat  op = "beat"  // the data plane is alive
	opLook  op = "look"  // tell the state
	opUndo  op = "undo"  // restore the namespace, and end
	opLeave op = "leave" // end, and leave the namespace closed
	opClean op = "clean" // instead of all others: undo what a dead keeper has left, and end
)

// Order tells the keeper what to do. It is sent with the first request.
type Order struct {
	Kernel   kernel.Config
	TUN      netns.TUNOptions
	Addrs    []netip.Prefix // of the TUN
	Taken    []netip.Prefix // networks that viasocks needs, which no device of the namespace may have
	LogLevel slog.Level
}

type request struct {
	Op    op
	Order *Order `json:",omitempty"`
}

type answer struct {
	Err   string `json:",omitempty"`
	Taken bool   `json:",omitempty"` // Err: another viasocks steers the namespace
	Opened
	State
	Removed []string `json:",omitempty"` // opClean: a line for each thing
}

// Opened describes the TUN that the keeper has made.
type Opened struct {
	Name      string `json:",omitempty"`
	Index     int    `json:",omitempty"`
	IPv6      bool   `json:",omitempty"` // it has its IPv6 addresses
	Queues    int    `json:",omitempty"` // the first files of the answer; the last one is the sock_diag socket
	Recovered bool   `json:",omitempty"` // a dead viasocks had left the namespace closed
	Reset     int    `json:",omitempty"` // connections that it had carried, and that were reset
}

// State is what the keeper sees in the namespace.
type State struct {
	Fault    string           `json:",omitempty"` // what is wrong with the TUN; "": nothing
	Lost     bool             `json:",omitempty"` // the TUN is not in the namespace any more
	Warnings []string         `json:",omitempty"`
	Private  []string         `json:",omitempty"` // private networks that are reached past the proxy
	Refused  []kernel.Counter `json:",omitempty"`
}

// maxMessage limits a message. The longest ones are orders with full lists of exclusions.
const maxMessage = 160 << 10

// maxFiles is the kernel's SCM_MAX_FD.
const maxFiles = 253

// send sends one message with files.
func send(c *net.UnixConn, message any, files ...*os.File) error {
	b, err := json.Marshal(message)
	if err != nil {
		return err
	}
	if len(b) > maxMessage {
		return fmt.Errorf("a message of %d bytes is too long", len(b))
	}
	var oob []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		oob = unix.UnixRights(fds...)
	}
	_, _, err = c.WriteMsgUnix(b, oob, nil)
	return err
}

// receive reads one message and its files, which belong to the caller even if there is an error.
func receive(c *net.UnixConn, message any) (files []*os.File, err error) {
	b, oob := make([]byte, maxMessage+1), make([]byte, unix.CmsgSpace(maxFiles*4))
	n, oobn, flags, _, err := c.ReadMsgUnix(b, oob)
	if err != nil {
		return nil, err
	}
	if msgs, err := unix.ParseSocketControlMessage(oob[:oobn]); err == nil {
		for _, m := range msgs {
			fds, err := unix.ParseUnixRights(&m)
			if err != nil {
				continue
			}
			for _, fd := range fds {
				unix.CloseOnExec(fd)
				files = append(files, os.NewFile(uintptr(fd), "/dev/net/tun"))
			}
		}
	}
	switch {
	case n == 0:
		return files, io.EOF
	case n > maxMessage || flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0:
		return files, errors.New("a message is too long")
	}
	if err := json.Unmarshal(b[:n], message); err != nil {
		return files, fmt.Errorf("malformed message: %w", err)
	}
	return files, nil
}

// socketPair returns a connection and the file of its other end.
func socketPair() (*net.UnixConn, *os.File, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	theirs := os.NewFile(uintptr(pair[1]), "keeper")
	c, err := connOf(os.NewFile(uintptr(pair[0]), "keeper"))
	if err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return c, theirs, nil
}

// connOf returns f as a connection. It closes f.
func connOf(f *os.File) (*net.UnixConn, error) {
	defer f.Close()
	// The longest message must fit into the buffer.
	_ = unix.SetsockoptInt(int(f.Fd()), unix.SOL_SOCKET, unix.SO_SNDBUF, 2*maxMessage)
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return c.(*net.UnixConn), nil
}
