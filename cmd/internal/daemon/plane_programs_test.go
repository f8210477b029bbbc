package daemon

import (
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
	"github.com/viasocks/viasocks/tun/netns"
)

// countedOwners knows the flows with a source port above 1000, and counts the questions.
type countedOwners struct{ asked, calls int }

func (c *countedOwners) OwnersOf(flows []flow.Flow, owners []flow.Owner) {
	c.calls++
	for i, f := range flows {
		c.asked++
		if port := f.Src.Port(); port > 1000 {
			owners[i] = flow.Owner{Known: true, PID: int(port), Exe: "/bin/" + f.Proto.String()}
		}
	}
}

func TestPrograms(t *testing.T) {
	from := &countedOwners{}
	p := newPrograms(from)
	list := func() []control.Flow {
		return []control.Flow{
			{ID: 1, Proto: "tcp", Src: "198.18.0.1:2000", Dst: "203.0.113.1:80"},
			{ID: 2, Proto: "udp", Src: "198.18.0.1:3000", Dst: "203.0.113.1:80"},
			{ID: 3, Proto: "tcp", Src: "198.18.0.1:5", Dst: "203.0.113.1:80"}, // nobody knows it
			{ID: 4, Proto: "tcp", Src: "198.18.0.1:6", Dst: "203.0.113.1:80", PID: 77, Exe: "/bin/known"},
			{ID: 5, Proto: "tcp", Src: "nonsense", Dst: ""},
		}
	}
	for range 2 {
		flows := list()
		p.name(flows)
		for i, want := range []struct {
			pid int
			exe string
		}{{2000, "/bin/tcp"}, {3000, "/bin/udp"}, {}, {77, "/bin/known"}, {}} {
			if f := flows[i]; f.PID != want.pid || f.Exe != want.exe {
				t.Errorf("%+v, want %+v", f, want)
			}
		}
	}
	if from.calls != 1 || from.asked != 3 {
		t.Errorf("%d questions in %d calls: what is known was asked for again", from.asked, from.calls)
	}
	k := p.known[3]
	k.at = time.Now().Add(-lookAgain)
	p.known[3] = k
	if p.name(list()); from.asked != 4 {
		t.Errorf("%d questions: what was not found is to be looked for again", from.asked)
	}

	many := make([]control.Flow, maxPrograms+10)
	for i := range many {
		many[i] = control.Flow{ID: uint64(100 + i), Proto: "tcp", Src: "198.18.0.1:2000", Dst: "203.0.113.1:80"}
	}
	before := from.asked
	p.name(many)
	if n := from.asked - before; n != maxLookups {
		t.Errorf("%d questions at a time", n)
	}
	for range len(many)/maxLookups + 1 {
		p.name(many)
	}
	if len(p.known) > maxPrograms {
		t.Errorf("%d are remembered", len(p.known))
	}
	newPrograms(nil).name(many) // nobody can be asked
}

// The socket of a real program is this test's own.
func TestProgramOfSocket(t *testing.T) {
	testkit.CheckLeaks(t)
	diag, err := netns.OpenDiag()
	if err != nil {
		t.Skip(err)
	}
	defer diag.Close()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	p := newPrograms(ownersOf(diagSockets{diag, nil}))
	flows := []control.Flow{{ID: 9, Proto: "tcp", Src: c.LocalAddr().String(), Dst: c.RemoteAddr().String()}}
	p.name(flows)
	exe, _ := os.Executable()
	if f := flows[0]; f.PID != os.Getpid() || filepath.Base(f.Exe) != filepath.Base(exe) {
		t.Errorf("%+v, want process %d, %s", f, os.Getpid(), exe)
	}
}
