package control

import (
	"context"
	"fmt"
	"net/http"
	"os"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/cmd/internal/privsock"
)

// Process is the client of a request, as the kernel knows it.
type Process struct {
	PID, UID int
	handle   *os.File // a pidfd
}

// Alive reports whether the process has not ended. Its number is not given to another process as long as it has not.
func (p Process) Alive() bool {
	fds := []unix.PollFd{{Fd: int32(p.handle.Fd()), Events: unix.POLLIN}}
	for {
		// A signal interrupts even a poll that does not wait, and the Go runtime sends signals to its own threads.
		if n, err := unix.Poll(fds, 0); err != unix.EINTR {
			return err == nil && n == 0
		}
	}
}

type connKey struct{}

// process returns the client of a request. The caller closes its handle.
func process(ctx context.Context, p privsock.Peer) (Process, error) {
	out := Process{PID: int(p.PID), UID: int(p.UID)}
	c, ok := ctx.Value(connKey{}).(*conn)
	if !ok || p.Err != nil || p.PID <= 0 {
		return out, fmt.Errorf("the process that asks is not visible to viasocks: it is in another process namespace")
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return out, err
	}
	fd := -1
	_ = raw.Control(func(sock uintptr) {
		if fd, err = unix.GetsockoptInt(int(sock), unix.SOL_SOCKET, unix.SO_PEERPIDFD); err != nil {
			fd, err = unix.PidfdOpen(out.PID, 0) // Linux before 6.5
		}
	})
	if err != nil {
		return out, fmt.Errorf("the process that asks can't be found: %w", err)
	}
	out.handle = os.NewFile(uintptr(fd), "pidfd")
	return out, nil
}

// choose handles requests of programs that want to go another way than the configuration says. Only programs of owners
// and, if members is true, of members of the control group may.
func (s *Server) choose(members bool, f func(Process) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		p, _ := r.Context().Value(peerKey{}).(privsock.Peer)
		if !p.Owner() && !(members && p.In(s.o.Group)) {
			s.refuse(w, p, mayChoose)
			return
		}
		client, err := process(r.Context(), p)
		if err == nil {
			defer client.handle.Close()
			err = f(client)
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusConflict)
			return
		}
		s.o.Log.Info("control", "request", r.Method+" "+r.URL.Path, "uid", p.UID, "pid", p.PID)
		w.WriteHeader(http.StatusNoContent)
	}
}

// Exclude lets the traffic of the calling process, and of its future children, go past the proxy.
func (c *Client) Exclude() error { return c.askAgain("POST", "/v1/exclude") }

// Include lets the traffic of the calling process go through the proxy, whatever the configuration excludes.
func (c *Client) Include() error { return c.askAgain("POST", "/v1/include") }
