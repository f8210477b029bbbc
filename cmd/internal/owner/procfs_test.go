package owner

import (
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// A socket of this process is found, with its holder, and so are a child and its parent.
func TestProcfs(t *testing.T) {
	testkit.CheckLeaks(t)
	self := strconv.Itoa(os.Getpid())
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	raw, err := l.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if e := raw.Control(func(fd uintptr) { err = unix.Fstat(int(fd), &st) }); e != nil || err != nil {
		t.Fatal(e, err)
	}
	inode := uint32(st.Ino)
	if !HasSocket(self, inode) || !slices.Contains(Holders(inode), self) {
		t.Errorf("socket %d of process %s: held by %q", inode, self, Holders(inode))
	}
	child := exec.Command("cat")
	in, err := child.StdinPipe() // it waits for its end
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); _ = child.Wait() })
	pid := strconv.Itoa(child.Process.Pid)
	if HasSocket(pid, inode) {
		t.Error("the child has the socket, which is not inherited")
	}
	if p := Parent(pid); p != self {
		t.Errorf("the parent of %s is %q, want %s", pid, p, self)
	}
	if all := Descendants([]string{self}); all[0] != self || !slices.Contains(all, pid) {
		t.Errorf("%q does not contain %s", all, pid)
	}
	if exe, _ := os.Executable(); ExeOf(self) != exe {
		t.Errorf("%q, want %q", ExeOf(self), exe)
	}
	if Parent("0") != "" {
		t.Error("process 0 has a parent")
	}
}

// A process with many files is looked at last: reading them takes longer than a short connection lives.
func TestLightFirst(t *testing.T) {
	sizes := map[string]int64{"1": 250, "20": 4, "300": 19_000, "4000": 4, "5000": 0}
	got := lightFirst([]string{"1", "20", "300", "4000", "5000"}, func(pid string) int64 { return sizes[pid] })
	if want := []string{"5000", "4000", "20", "1", "300"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}
