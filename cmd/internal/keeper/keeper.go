package keeper

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/viasocks/viasocks/tun/netns"
)

// Limits of the wait for the keeper. Its work takes some ten milliseconds; a loaded machine may need more.
const (
	answerTime = 30 * time.Second
	lookTime   = 2 * time.Second
	leaveTime  = 10 * time.Second
)

// ErrTaken means that another viasocks steers the namespace.
var ErrTaken = errors.New(
	"cannot steer the namespace: another viasocks does: see 'viasocks ps', or end that one: 'viasocks down' with the same name",
)

// ErrGone means that the keeper has ended although it was not told to.
var ErrGone = errors.New("the process that steers the namespace has ended")

// Keeper is the keeper from the outside. Its methods may be called concurrently, except Close.
type Keeper struct {
	p     *os.Process
	conn  *net.UnixConn
	ended chan struct{} // closed when the process has ended

	mu   sync.Mutex // a request and its answer
	over bool       // the last answer did not come in time, so that the next would be taken for it
}

// Start starts a keeper in ns. Its log goes to stderr. Nothing is changed yet.
func Start(ns *netns.Namespace, stderr *os.File) (*Keeper, error) {
	conn, theirs, err := socketPair()
	if err != nil {
		return nil, fmt.Errorf("cannot start a process in the namespace: %w", err)
	}
	defer theirs.Close()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("cannot start a process in the namespace: %w", err)
	}
	defer null.Close()
	env := []string{"GOMAXPROCS=1", "GOGC=400"}
	if dir, ok := os.LookupEnv("GOCOVERDIR"); ok { // an executable built with coverage writes a warning without it
		env = append(env, "GOCOVERDIR="+dir)
	}
	p, err := ns.Start([]string{name, "3"}, env, []*os.File{null, null, stderr, theirs})
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("cannot start a process in the namespace: %w", err)
	}
	k := &Keeper{p: p, conn: conn, ended: make(chan struct{})}
	go func() {
		defer close(k.ended)
		_, _ = p.Wait()
	}()
	return k, nil
}

// PID returns the process id of the keeper, which is in the namespace.
func (k *Keeper) PID() int { return k.p.Pid }

// Ended is closed when the keeper has ended.
func (k *Keeper) Ended() <-chan struct{} { return k.ended }

// Open closes the namespace and returns a TUN inside it and a sock_diag socket, which belong to the caller. The order is
// needed the first time, and ignored later.
func (k *Keeper) Open(o *Order) (Opened, []*os.File, *netns.Diag, error) {
	a, files, err := k.ask(request{opOpen, o}, answerTime)
	if err != nil {
		closeAll(files)
		return Opened{}, nil, nil, err
	}
	if a.Queues < 1 || len(files) != a.Queues+1 {
		closeAll(files)
		return Opened{}, nil, nil, fmt.Errorf("cannot steer the namespace: %d files were handed over", len(files))
	}
	diag, err := netns.DiagFromFile(files[a.Queues])
	if err != nil {
		closeAll(files[:a.Queues])
		return Opened{}, nil, nil, err
	}
	diag.SetInterface(a.Index)
	return a.Opened, files[:a.Queues], diag, nil
}

// Steer sends the programs' packets into the TUN.
func (k *Keeper) Steer() error {
	_, files, err := k.ask(request{Op: opSteer}, answerTime)
	closeAll(files)
	return err
}

// Beat tells the keeper that the data plane is alive. Without it, the filter refuses packets to the TUN after a while.
func (k *Keeper) Beat() {
	k.mu.Lock()
	defer k.mu.Unlock()
	_ = k.conn.SetWriteDeadline(time.Now().Add(lookTime))
	_ = send(k.conn, request{Op: opBeat}) // Ended tells when it is gone
}

// Look returns the state of the namespace.
func (k *Keeper) Look() (State, error) {
	a, files, err := k.ask(request{Op: opLook}, lookTime)
	closeAll(files)
	return a.State, err
}

// Clean undoes what a dead keeper has left in the namespace, ends the keeper, and returns a line for each thing that was
// removed.
func (k *Keeper) Clean(o *Order) ([]string, error) {
	a, files, err := k.ask(request{opClean, o}, answerTime)
	closeAll(files)
	return a.Removed, err
}

// Undo restores the namespace and ends the keeper.
func (k *Keeper) Undo() error { return k.end(opUndo) }

// Leave ends the keeper and leaves the namespace closed.
func (k *Keeper) Leave() error { return k.end(opLeave) }

func (k *Keeper) end(what op) error {
	_, files, err := k.ask(request{Op: what}, answerTime)
	closeAll(files)
	return err
}

// Close ends a keeper that is still there, as the death of this process would, and waits for its end.
func (k *Keeper) Close() {
	k.conn.Close()
	select {
	case <-k.ended:
	case <-time.After(leaveTime):
		_ = k.p.Signal(syscall.SIGKILL)
		<-k.ended
	}
}

// ask sends a request and returns the answer. An error in it is returned as err.
func (k *Keeper) ask(r request, limit time.Duration) (a answer, files []*os.File, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.over {
		return a, nil, errors.New("cannot ask the process in the namespace: it did not answer in time before")
	}
	_ = k.conn.SetDeadline(time.Now().Add(limit))
	if err = send(k.conn, r); err == nil {
		files, err = receive(k.conn, &a)
	}
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		k.over = true
		return a, files, errors.New("the process in the namespace does not answer")
	case errors.Is(err, io.EOF) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET):
		return a, files, ErrGone
	case err != nil:
		return a, files, fmt.Errorf("cannot ask the process in the namespace: %w", err)
	case a.Taken:
		return a, files, ErrTaken
	case a.Err != "":
		return a, files, errors.New(a.Err)
	}
	return a, files, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
