package handover

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxMessage limits a message in bytes. A flow needs some 100.
	maxMessage = 32 << 20
	// maxFiles limits the descriptors of one message (SCM_MAX_FD of the kernel is 253).
	maxFiles = 64
	// stepTime limits each message of the other process.
	stepTime = 15 * time.Second
	// goTime limits how long the new process takes to answer whether the host shall change hands now.
	goTime = 3 * time.Second
	// takenTime limits how long the old process takes to list its flows. It is long because the new process has the host by
	// then, and would only end if it gave up.
	takenTime = time.Minute
)

// A message is its length, 4 bytes in network byte order, and JSON. Descriptors travel with its first byte
// (SCM_RIGHTS, unix(7)).

// send writes a message. The files stay the caller's.
func send(c *net.UnixConn, v any, files ...*os.File) error {
	body, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(body) > maxMessage {
		return fmt.Errorf("a message of %d bytes is too long", len(body))
	}
	msg := append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...)
	var rights []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		rights = unix.UnixRights(fds...)
	}
	if err := c.SetWriteDeadline(time.Now().Add(stepTime)); err != nil {
		return err
	}
	n, _, err := c.WriteMsgUnix(msg, rights, nil)
	if err == nil && n < len(msg) {
		_, err = c.Write(msg[n:])
	}
	return err
}

// receive reads a message into v, within the time given, and returns its files, which the caller closes.
func receive(c *net.UnixConn, v any, within time.Duration) (files []*os.File, err error) {
	if err := c.SetReadDeadline(time.Now().Add(within)); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			closeAll(files)
			files = nil
		}
	}()
	var head [4]byte
	oob := make([]byte, unix.CmsgSpace(4*maxFiles))
	n, oobn, flags, _, err := c.ReadMsgUnix(head[:], oob)
	if err != nil {
		return nil, err
	}
	files, err = parseFiles(oob[:oobn])
	switch {
	case err != nil:
		return files, err
	case flags&unix.MSG_CTRUNC != 0:
		return files, errors.New("a message has too many descriptors")
	case n == 0:
		return files, io.EOF
	}
	if _, err := io.ReadFull(c, head[n:]); err != nil {
		return files, err
	}
	size := binary.BigEndian.Uint32(head[:])
	if size > maxMessage {
		return files, fmt.Errorf("a message of %d bytes is too long", size)
	}
	body, err := io.ReadAll(io.LimitReader(c, int64(size))) // grows with what arrives, not with what is promised
	if err != nil {
		return files, err
	}
	if len(body) < int(size) {
		return files, io.ErrUnexpectedEOF
	}
	return files, json.Unmarshal(body, v)
}

func parseFiles(oob []byte) (files []*os.File, err error) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	for _, m := range msgs {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue // credentials or the like
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "handed over"))
		}
	}
	return files, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
