package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/route/kernel"
)

// ErrNoDaemon means that nothing answers at the socket.
var ErrNoDaemon = errors.New(
	"cannot ask viasocks: it is not up here: 'viasocks up' starts it; 'viasocks ps' lists programs under 'viasocks run'",
)

// leftClosed is the ErrNoDaemon of a host that a daemon has left closed.
type leftClosed struct{}

func (leftClosed) Error() string {
	return "cannot ask viasocks: it is not up here, and the host was left closed: 'viasocks up' carries it again, " +
		"'viasocks down' opens it"
}

func (leftClosed) Is(target error) bool { return target == ErrNoDaemon }

// ErrOlder means that the viasocks that answers does not know the request.
var ErrOlder = errors.New(
	"the running viasocks does not know this request, probably because it is of an older version: restart it",
)

const (
	maxAnswer     = 32 << 20
	clientTimeout = 15 * time.Second
	// crowdWait limits the time in which a daemon may be too busy to answer, and crowdPause is that between two attempts.
	crowdWait, crowdPause = 5 * time.Second, 20 * time.Millisecond
)

// errClosed means that the daemon has closed the connection without an answer.
var errClosed = errors.New("it closed the connection: it is stopping, or too many ask it at once: try again")

// Client talks to the daemon at a socket.
type Client struct {
	http  http.Client
	path  string
	owner int                        // user who must own the viasocks, besides root; negative: any
	dir   *runDir                    // the directory that contains path, to be closed; nil: none
	peer  atomic.Pointer[unix.Ucred] // the process that answered last
}

// NewClient returns a Client for the socket at path. It opens nothing before the first request. The caller must Close
// it.
func NewClient(path string) *Client {
	c := &Client{path: path, owner: -1}
	c.http = http.Client{
		Timeout:   clientTimeout,
		Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return c.dial(ctx) }},
	}
	return c
}

// SetTimeout bounds each question; without it, it is 15 s.
func (c *Client) SetTimeout(d time.Duration) { c.http.Timeout = d }

// Close closes what is open.
func (c *Client) Close() {
	c.http.CloseIdleConnections()
	if c.dir != nil {
		c.dir.close()
		c.dir = nil
	}
}

// Status requests the status.
func (c *Client) Status() (s Status, err error) { return s, c.ask("GET", "/v1/status", &s) }

// Flows requests at most limit flows; 0: the daemon's default.
func (c *Client) Flows(limit int) (f Flows, err error) {
	q := ""
	if limit > 0 {
		q = fmt.Sprintf("?limit=%d", limit)
	}
	return f, c.ask("GET", "/v1/flows"+q, &f)
}

// Confirm confirms that the steering will stay.
func (c *Client) Confirm() error { return c.ask("POST", "/v1/confirm", nil) }

// Down tells the daemon to stop. It returns when the daemon has been told; see Wait.
func (c *Client) Down() error { return c.ask("POST", "/v1/down", nil) }

// Wait returns when no daemon is alive any more, or with an error after limit.
func (c *Client) Wait(limit time.Duration) error {
	for end := time.Now().Add(limit); Locked(c.path); {
		if time.Now().After(end) {
			return fmt.Errorf("cannot stop viasocks: it did not end within %v", limit)
		}
		time.Sleep(20 * time.Millisecond)
	}
	return nil
}

// askAgain is ask for a request that may be made twice. A daemon that has as many connections as it takes closes further
// ones before it has read anything; they are made again until crowdWait is over.
func (c *Client) askAgain(method, what string) error {
	for end := time.Now().Add(crowdWait); ; time.Sleep(crowdPause) {
		err := c.ask(method, what, nil)
		if !errors.Is(err, errClosed) || time.Now().After(end) {
			return err
		}
	}
}

func (c *Client) ask(method, what string, into any) error {
	req, err := http.NewRequest(method, "http://viasocks"+what, nil)
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return c.explain(err)
	}
	defer resp.Body.Close()
	body := io.LimitReader(resp.Body, maxAnswer)
	if resp.StatusCode/100 != 2 {
		return refusal(strings.TrimPrefix(req.URL.Path, "/v1/"), resp)
	}
	if into == nil {
		return nil
	}
	if err := json.NewDecoder(body).Decode(into); err != nil {
		return fmt.Errorf("cannot understand the answer of viasocks: %w", err)
	}
	return nil
}

// refusal is the error of an answer that is none to what was asked.
func refusal(what string, resp *http.Response) error {
	if resp.StatusCode == http.StatusNotFound {
		return fmt.Errorf("cannot ask for %s: %w", what, ErrOlder)
	}
	b, _ := io.ReadAll(io.LimitReader(resp.Body, 1024))
	return fmt.Errorf("cannot %s: %s", what, strings.TrimSpace(string(b)))
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func (c *Client) explain(err error) error {
	var dial *net.OpError
	errors.As(err, &dial)
	switch {
	case c.dir != nil && (errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ECONNREFUSED)):
		return fmt.Errorf("cannot ask viasocks: %w", ErrEnded)
	case errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.ECONNREFUSED):
		if Locked(c.path) {
			return errors.New("cannot ask viasocks: it is starting or stopping, and does not answer yet")
		}
		if pid, ok := claimant(); ok {
			return fmt.Errorf(
				"cannot ask viasocks: it is up here with another state directory (process %d): give the same --state-dir",
				pid,
			)
		}
		if journal, err := kernel.JournalPath(filepath.Dir(c.path)); err == nil && exists(journal) {
			return leftClosed{}
		}
		return ErrNoDaemon
	case errors.Is(err, syscall.EACCES):
		return errors.New(
			"cannot ask viasocks: permission denied: use sudo, or be in the group that it was given by --control-group",
		)
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("cannot ask viasocks: no answer within %v", c.http.Timeout)
	case dial != nil && !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE):
		return fmt.Errorf("cannot ask viasocks at %s: %w", c.path, dial.Err)
	}
	return fmt.Errorf("cannot ask viasocks: %w", errClosed)
}
