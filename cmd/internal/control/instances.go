package control

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os/user"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/cmd/internal/privsock"
)

// Kinds of instances, which are the values of Status.Mode.
const (
	ModeUp     = "up"
	ModeRun    = "run"
	ModeAttach = "attach"
)

// NoAnswer is the State of an instance that has a socket and does not answer.
const NoAnswer = "no answer"

// Instance is a summary of a running viasocks.
type Instance struct {
	PID     int       `json:"pid"`
	UID     int       `json:"uid"`
	User    string    `json:"user"`              // name of UID, or its number
	Mode    string    `json:"mode"`              // run, up or attach
	Program string    `json:"program,omitempty"` // attach: what names the namespace
	Name    string    `json:"name,omitempty"`    // of --name
	Inside  int       `json:"program_pid,omitempty"`
	Proxy   string    `json:"proxy"` // without user and password
	State   string    `json:"state"`
	Since   time.Time `json:"since"`
	Flows   int       `json:"flows"` // TCP connections and UDP mappings, now
	Up      uint64    `json:"up_bytes"`
	Down    uint64    `json:"down_bytes"`
}

const (
	// lookTimeout limits the wait for the answer of one instance.
	lookTimeout = 2 * time.Second
	// lookers is the number of instances that are asked concurrently.
	lookers = 16
	// maxSilent is the number of instances in one directory that may not answer before the others there are left out: its
	// user could make root wait for minutes.
	maxSilent = 8
)

// Instances lists the instances of the calling user, or of all users for root, by process id, and the one at the
// socket upPath if the caller may ask it. It removes the caller's own sockets of killed instances.
func Instances(r Runtime, upPath string) []Instance { return look(r, upPath, r.existing()) }

// OwnInstances lists the instances of the calling user alone, also for root. Whatever chooses an instance by itself, or
// by a name, asks for these: other users choose the names of theirs, and what they answer.
func OwnInstances(r Runtime) []Instance { return look(r, "", r.own()) }

// look asks the instances in dirs, which it closes, and the one at upPath.
func look(r Runtime, upPath string, dirs []*runDir) []Instance {
	var mu sync.Mutex
	all := []Instance{}
	var wg sync.WaitGroup
	places := make(chan struct{}, lookers)
	add := func(c *Client, silent *atomic.Int32) {
		places <- struct{}{}
		wg.Go(func() {
			defer func() { <-places }()
			defer c.Close()
			if silent.Load() >= maxSilent {
				return
			}
			if i, ok := c.instance(); ok {
				if i.State == NoAnswer {
					silent.Add(1)
				}
				mu.Lock()
				all = append(all, i)
				mu.Unlock()
			}
		})
	}
	if upPath != "" {
		add(NewClient(upPath), new(atomic.Int32))
	}
	for _, d := range dirs {
		if d.uid == r.UID && d.lock() == nil {
			d.reap()
			d.unlock()
		}
		silent := new(atomic.Int32)
		for _, name := range d.sockets() {
			add(d.client(name), silent)
		}
	}
	wg.Wait()
	for _, d := range dirs {
		d.close()
	}
	slices.SortFunc(all, func(a, b Instance) int { return cmp.Or(cmp.Compare(a.PID, b.PID), cmp.Compare(a.UID, b.UID)) })
	return all
}

// client returns a Client for a socket in d. It works until d is closed.
func (d *runDir) client(name string) *Client {
	c := NewClient(d.at(name))
	c.owner = d.uid
	return c
}

// instance asks the client's viasocks for its summary. ok is false if there is none.
func (c *Client) instance() (i Instance, ok bool) {
	c.http.Timeout = lookTimeout
	s, err := c.Status()
	at := c.peer.Load()
	if at == nil {
		return i, false // it does not exist, or we may not ask it
	}
	i = Instance{PID: int(at.Pid), UID: int(at.Uid), User: userName(int(at.Uid)), Mode: ModeRun, State: NoAnswer}
	if err != nil {
		return i, true
	}
	i.Mode, i.Program, i.State, i.Since = cmp.Or(s.Mode, ModeUp), s.Program, s.State, s.Since
	i.Name, i.Inside = s.Name, s.Inside
	i.Flows, i.Up, i.Down = s.TCP.Now+s.UDP.Now, s.Up, s.Down
	for _, u := range s.Upstreams {
		if u.URL != "" {
			i.Proxy = withoutUser(u.URL)
			break
		}
	}
	return i, true
}

// withoutUser returns the URL of a proxy without the user.
func withoutUser(text string) string {
	u, err := url.Parse(text)
	if err != nil || u.User == nil {
		return text
	}
	u.User = nil
	return u.String()
}

func userName(uid int) string {
	if u, err := user.LookupId(strconv.Itoa(uid)); err == nil {
		return u.Username
	}
	return strconv.Itoa(uid)
}

// Find returns a Client for the instance with this process id, which must be one that Instances lists. The caller
// must close it.
func Find(r Runtime, upPath string, pid int) (*Client, error) {
	if c := NewClient(upPath); c.isOf(pid) {
		return c, nil
	}
	for _, d := range r.existing() {
		for _, name := range d.sockets() {
			if c := d.client(name); c.isOf(pid) {
				c.dir = d
				return c, nil
			}
		}
		d.close()
	}
	return nil, fmt.Errorf("cannot find a viasocks with the process id %d among those that you may ask: see 'viasocks ps'", pid)
}

// isOf connects, reports whether the other side is the process pid, and closes the connection.
func (c *Client) isOf(pid int) bool {
	ctx, cancel := context.WithTimeout(context.Background(), lookTimeout)
	defer cancel()
	conn, err := c.dial(ctx)
	if err != nil {
		return false
	}
	conn.Close()
	return int(c.peer.Load().Pid) == pid
}

// dial connects to the viasocks. It refuses one of another user than the owner of the socket.
func (c *Client) dial(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", c.path)
	if err != nil {
		return nil, err
	}
	p := privsock.PeerOf(conn.(*net.UnixConn))
	if p.Err != nil || c.owner >= 0 && int(p.UID) != c.owner && p.UID != 0 {
		conn.Close()
		return nil, &net.OpError{Op: "dial", Net: "unix", Err: errors.Join(errNotOwner, p.Err)}
	}
	c.peer.Store(&unix.Ucred{Pid: p.PID, Uid: p.UID, Gid: p.GID})
	return conn, nil
}

var errNotOwner = errors.New("another user answers there")
