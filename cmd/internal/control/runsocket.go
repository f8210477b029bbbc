package control

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"os"

	"github.com/viasocks/viasocks/cmd/internal/privsock"
)

// runPrefix begins the names of sockets. The process id and some random digits follow, because two containers that
// share the directory may have the same process ids.
const runPrefix = "run-"

// ListenRun creates the control socket of an instance of `run` in the user's directory, removes those of killed
// instances, and starts to answer. Path and Group of o are not used.
func ListenRun(r Runtime, o Options) (*Server, error) {
	d, err := r.create()
	if err != nil {
		return nil, fmt.Errorf("cannot make a control socket: %w", err)
	}
	fail := func(err error) (*Server, error) {
		d.close()
		return nil, fmt.Errorf("cannot make a control socket in %s: %w", d.path, err)
	}
	defer d.unlock()
	d.reap()
	var random [4]byte
	_, _ = rand.Read(random[:]) // never fails
	name := fmt.Sprintf("%s%d-%s.sock", runPrefix, os.Getpid(), hex.EncodeToString(random[:]))
	o.Path, o.Group = d.at(name), -1
	l, err := privsock.Listen(o.Path, -1)
	if err != nil {
		return fail(err)
	}
	s := serve(o, l)
	s.remove = func() { d.remove(name) }
	return s, nil
}
