package netns

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// Messages between Spawn and the helper over a socket pair:
//
//	Spawn  -> helper   order
//	helper -> Spawn    report, with the TUN's queues and the sock_diag socket as SCM_RIGHTS; or a report with an error, after
//	                   which the helper exits
//	Spawn  -> helper   goAhead; EOF instead: Spawn's process is gone, and the helper exits
//	helper -> Wait     EOF when the helper has become the program, or a report if it could not
//
// order and report are JSON, preceded by their length in four bytes. Arguments are sent as bytes, because JSON
// strings would replace invalid UTF-8.
const goAhead = 'g'

// maxMessage limits what is read. Arguments and environment are at most 2 MiB (the limit of exec for the usual
// stack), and base64 adds a third.
const maxMessage = 16 << 20

// maxQueues is the kernel's SCM_MAX_FD, less one for the sock_diag socket and one for the maker of sockets.
const maxQueues = 251

type order struct {
	Argv, Env  [][]byte
	Dir        []byte
	TUN        TUNOptions
	Addrs      []netip.Prefix
	Gateway    netip.Addr
	Nameserver []netip.Addr
	Search     []string
	DotsAsIs   bool
	Local      []netip.Prefix
	Host       HostEntry
	Sockets    bool
	User       *User
	Kept       bool // there is a keeper, whose socket comes after the helper's own
	Rootless   bool
}

type report struct {
	Err      string `json:",omitempty"`
	Denied   bool   `json:",omitempty"` // Err is due to missing privileges
	Exit     int    `json:",omitempty"`
	TUNName  string `json:",omitempty"`
	TUNIndex int    `json:",omitempty"`
	IPv6     bool   `json:",omitempty"`
	// number of queues of the TUN, each with a file; one more file is the sock_diag socket
	Queues  int    `json:",omitempty"`
	DiagErr string `json:",omitempty"`
	Maker   int    `json:",omitempty"` // the pid of the maker of sockets, whose socket is the last file
}

// files returns the number of files that come with the report.
func (r *report) files() int {
	n := r.Queues
	if r.DiagErr == "" {
		n++
	}
	if r.Maker != 0 {
		n++
	}
	return n
}

func frame(msg []byte) []byte {
	b := binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(msg)), uint32(len(msg)))
	return append(b, msg...)
}

// readFrame reads one message. first contains the bytes that were already read.
func readFrame(r io.Reader, first []byte) ([]byte, error) {
	var size [4]byte
	if len(first) > 4 {
		return nil, errors.New("malformed message")
	}
	n := copy(size[:], first)
	if _, err := io.ReadFull(r, size[n:]); err != nil {
		return nil, err
	}
	l := binary.BigEndian.Uint32(size[:])
	if l > maxMessage {
		return nil, fmt.Errorf("message of %d bytes", l)
	}
	b := make([]byte, l)
	_, err := io.ReadFull(r, b)
	return b, err
}

// readReport reads a report and the files that came with it. The caller owns the files, even if there is an error.
func readReport(c *net.UnixConn) (r report, files []*os.File, err error) {
	first, oob := make([]byte, 4), make([]byte, unix.CmsgSpace((maxQueues+2)*4))
	n, oobn, _, _, err := c.ReadMsgUnix(first, oob)
	if err != nil {
		return r, nil, err
	}
	if n == 0 {
		return r, nil, io.ErrUnexpectedEOF
	}
	if msgs, err := unix.ParseSocketControlMessage(oob[:oobn]); err == nil {
		for _, m := range msgs {
			fds, err := unix.ParseUnixRights(&m)
			if err != nil {
				continue
			}
			for _, fd := range fds {
				files = append(files, os.NewFile(uintptr(fd), tunNode))
			}
		}
	}
	b, err := readFrame(c, first[:n])
	if err != nil {
		return r, files, err
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return r, files, fmt.Errorf("malformed message: %w", err)
	}
	return r, files, nil
}

// sendReport sends a report. The helper calls it.
func sendReport(sock int, r report, fds ...int) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	b = frame(b)
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	for len(b) > 0 {
		n, err := unix.SendmsgN(sock, b, oob, nil, unix.MSG_NOSIGNAL)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		b, oob = b[n:], nil
	}
	return nil
}

func toBytes(ss []string) [][]byte {
	bs := make([][]byte, len(ss))
	for i, s := range ss {
		bs[i] = []byte(s)
	}
	return bs
}

func toStrings(bs [][]byte) []string {
	ss := make([]string, len(bs))
	for i, b := range bs {
		ss[i] = string(b)
	}
	return ss
}
