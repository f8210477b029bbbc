package process

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/cmd/internal/control"
)

// Notifier tells systemd our state by sd_notify(3): datagrams on the unix socket that NOTIFY_SOCKET names. Without a
// socket it does nothing. Its methods may be called from any goroutine.
type Notifier struct {
	conn     *net.UnixConn
	watchdog time.Duration // how often systemd must hear from us; 0: never
	log      *slog.Logger
	last     atomic.Pointer[[]string] // the lines of Ready or Waiting, whichever came last
}

// sendTimeout limits one message, so that a systemd that does not read cannot block us.
const sendTimeout = time.Second

// NewNotifier reads NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID from environ, which has the form of os.Environ. An
// address that cannot be used is logged and is not an error, because the network matters more.
func NewNotifier(environ []string, log *slog.Logger) *Notifier {
	n := &Notifier{log: log}
	var addr, usec, pid string
	for _, e := range environ {
		name, value, _ := strings.Cut(e, "=")
		switch name {
		case "NOTIFY_SOCKET":
			addr = value
		case "WATCHDOG_USEC":
			usec = value
		case "WATCHDOG_PID":
			pid = value
		}
	}
	if addr == "" {
		return n
	}
	conn, err := dialNotify(addr)
	if err != nil {
		log.Warn("cannot notify systemd", "err", err)
		return n
	}
	n.conn = conn
	us, err := strconv.ParseInt(usec, 10, 64)
	if err == nil && us > 0 && us < 1<<50 && (pid == "" || pid == strconv.Itoa(os.Getpid())) {
		n.watchdog = time.Duration(us) * time.Microsecond
	}
	return n
}

func dialNotify(addr string) (*net.UnixConn, error) {
	if !strings.HasPrefix(addr, "/") && !strings.HasPrefix(addr, "@") {
		return nil, fmt.Errorf("NOTIFY_SOCKET=%q is neither a path nor an abstract name", addr)
	}
	return net.DialUnix("unixgram", nil, &net.UnixAddr{Name: addr, Net: "unixgram"})
}

// send sends assignments, one on each line.
func (n *Notifier) send(lines ...string) {
	if n.conn == nil {
		return
	}
	_ = n.conn.SetWriteDeadline(time.Now().Add(sendTimeout))
	if _, err := n.conn.Write([]byte(strings.Join(lines, "\n"))); err != nil && !errors.Is(err, net.ErrClosed) {
		n.log.Warn("cannot notify systemd", "err", err)
	}
}

func status(text string) string { return "STATUS=" + control.Plain(text) }

// Ready reports that the host is steered, or is so again after a reload.
func (n *Notifier) Ready(text string) { n.tell("READY=1", status(text)) }

// tell sends lines that Repeat can send again.
func (n *Notifier) tell(lines ...string) {
	n.last.Store(&lines)
	n.send(lines...)
}

// Repeat sends the last state again. It is for a process that systemd has ignored until it became the main process.
func (n *Notifier) Repeat() {
	if last := n.last.Load(); last != nil {
		n.send(*last...)
	}
}

// Reloading reports that the configuration is being read again. Ready must follow.
func (n *Notifier) Reloading() {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return
	}
	n.send("RELOADING=1", "MONOTONIC_USEC="+strconv.FormatInt(now.Nano()/1000, 10))
}

// Waiting reports that the start takes longer, and that the next message will come within the given time.
func (n *Notifier) Waiting(text string, within time.Duration) {
	n.tell(status(text), "EXTEND_TIMEOUT_USEC="+strconv.FormatInt((2*within).Microseconds(), 10))
}

// Hand tells systemd that the process pid is the service's main process from now on. It also feeds the watchdog, because
// systemd has ignored what that process sent before.
func (n *Notifier) Hand(pid int) { n.send("MAINPID="+strconv.Itoa(pid), "WATCHDOG=1") }

func (n *Notifier) Stopping() { n.send("STOPPING=1", status("stopping")) }

// Guard tells the watchdog that we are alive, three times as often as required, until ctx ends. It calls alive before
// each message. If that hangs, the messages stop and systemd ends us.
func (n *Notifier) Guard(ctx context.Context, alive func()) {
	if n.conn == nil || n.watchdog == 0 {
		return
	}
	tick := time.NewTicker(n.watchdog / 3)
	defer tick.Stop()
	for {
		alive()
		n.send("WATCHDOG=1")
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// Close closes the socket.
func (n *Notifier) Close() {
	if n.conn != nil {
		n.conn.Close()
	}
}
