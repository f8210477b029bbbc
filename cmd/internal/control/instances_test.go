package control

import (
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// runtimeOf is a Runtime below a directory of the test's own. All users can reach the places of other users in it.
func runtimeOf(t *testing.T) Runtime {
	t.Helper()
	dir, err := os.MkdirTemp("", "viasocks-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	r := Runtime{XDG: dir + "/xdg", Run: dir + "/run", Tmp: dir + "/tmp", UID: os.Geteuid()}
	for _, d := range []string{r.XDG, r.Run, r.Tmp} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return r
}

func runSample(program string) func() Status {
	return func() Status {
		return Status{
			PID: os.Getpid(), Mode: ModeRun, Program: program, State: Ready, Since: now,
			Upstreams: []Upstream{{Name: "proxy", URL: "socks5://al:***@10.0.0.1:1080"}},
			TCP:       TCP{Now: 3}, UDP: UDP{Now: 2}, Up: 7, Down: 8,
		}
	}
}

func listenRun(t *testing.T, r Runtime, program string) *Server {
	t.Helper()
	s, err := ListenRun(r, Options{Backend: Backend{Status: runSample(program), Flows: func() []Flow { return nil }}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func names(t *testing.T, dir string) (names []string) {
	t.Helper()
	all, err := os.ReadDir(dir)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	for _, e := range all {
		names = append(names, e.Name())
	}
	return names
}

func TestInstances(t *testing.T) {
	testkit.CheckLeaks(t)
	r := runtimeOf(t)
	if got := Instances(r, ""); got == nil || len(got) != 0 {
		t.Errorf("none: %+v", got)
	}
	a, b := listenRun(t, r, "aria2c"), listenRun(t, r, "curl")
	dir := filepath.Join(r.XDG, runDirName)
	info, err := os.Stat(dir)
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	for _, name := range names(t, dir) {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
	got := Instances(r, "")
	if len(got) != 2 {
		t.Fatalf("%+v", got)
	}
	programs := got[0].Program + " " + got[1].Program
	if programs != "aria2c curl" && programs != "curl aria2c" {
		t.Error(programs)
	}
	want := Instance{
		PID: os.Getpid(), UID: r.UID, User: userName(r.UID), Mode: ModeRun, Program: got[0].Program,
		Proxy: "socks5://10.0.0.1:1080", State: Ready,
		Since: now, Flows: 5, Up: 7, Down: 8,
	}
	if got[0] != want {
		t.Errorf("%+v, want %+v", got[0], want)
	}
	c, err := Find(r, "", os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if s, err := c.Status(); err != nil || s.Program != "aria2c" && s.Program != "curl" {
		t.Errorf("%+v, %v", s, err)
	}
	if err := c.Down(); err == nil {
		t.Error("a program under run was told to go down")
	}
	a.Close()
	b.Close()
	b.Close()
	if _, err := c.Status(); !errors.Is(err, ErrEnded) {
		t.Error(err)
	}
	c.Close()
	if _, err := Find(r, "", os.Getpid()); err == nil || !strings.Contains(err.Error(), "see 'viasocks ps'") {
		t.Error(err)
	}
	if left := names(t, r.XDG); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// stale makes what an instance leaves that is killed.
func stale(t *testing.T, dir, name string) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, name), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
}

// What killed instances left goes away with the next look and the next start; what is not ours to remove stays.
func TestStaleRunSockets(t *testing.T) {
	testkit.CheckLeaks(t)
	r := runtimeOf(t)
	dir := filepath.Join(r.XDG, runDirName)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "run-5-file.sock"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	stale(t, dir, "run-1-dead.sock")
	if got := Instances(r, ""); len(got) != 0 {
		t.Errorf("%+v", got)
	}
	if got := names(t, dir); len(got) != 1 {
		t.Errorf("after a look: %v", got)
	}
	stale(t, dir, "run-2-dead.sock")
	s := listenRun(t, r, "x")
	if got := names(t, dir); len(got) != 2 || got[0] == "run-2-dead.sock" {
		t.Errorf("after a start: %v", got)
	}
	s.Close()
	if got := names(t, dir); len(got) != 1 || got[0] != "run-5-file.sock" {
		t.Errorf("after the end: %v", got)
	}
}

// An instance that has a socket and does not answer is listed as such, and holds the others up for a bounded time.
func TestNoAnswer(t *testing.T) {
	testkit.CheckLeaks(t)
	r := runtimeOf(t)
	listenRun(t, r, "x")
	l, err := net.Listen("unix", filepath.Join(r.XDG, runDirName, "run-3-mute.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	start := time.Now()
	got := Instances(r, "")
	if len(got) != 2 || got[0].State != NoAnswer && got[1].State != NoAnswer {
		t.Errorf("%+v", got)
	}
	if took := time.Since(start); took > lookTimeout+testkit.Patience {
		t.Errorf("it took %v", took)
	}
}

// A directory that somebody else could have prepared is not used.
func TestUnsafeDirectories(t *testing.T) {
	testkit.CheckLeaks(t)
	prepare := func(f func(r Runtime, dir string)) string {
		r := runtimeOf(t)
		r.XDG = ""
		f(r, r.inTmp(r.UID))
		s, err := ListenRun(r, Options{})
		if err == nil {
			s.Close()
			return ""
		}
		if got := Instances(r, ""); len(got) > 0 {
			t.Errorf("%+v", got)
		}
		return err.Error()
	}
	for _, tt := range []struct {
		what, want string
		f          func(r Runtime, dir string)
	}{
		{"nothing", "", func(Runtime, string) {}},
		{"a link", "it is not a directory", func(r Runtime, dir string) { os.Mkdir(r.Tmp+"/x", 0o700); os.Symlink("x", dir) }},
		{"a file", "it is not a directory", func(_ Runtime, dir string) { os.WriteFile(dir, nil, 0o600) }},
		{"open to others", "others may use it", func(_ Runtime, dir string) { os.Mkdir(dir, 0o700); os.Chmod(dir, 0o711) }},
		{"of another user", "belongs to another user", func(_ Runtime, dir string) {
			os.Mkdir(dir, 0o700)
			os.Chown(dir, 12345, -1)
		}},
	} {
		if os.Getuid() != 0 && tt.what == "of another user" {
			continue // nobody else's directory can be made
		}
		got := prepare(tt.f)
		if tt.want == "" && got != "" || !strings.Contains(got, tt.want) {
			t.Errorf("%s: %q", tt.what, got)
		}
	}
}

// serveAs answers as another user, on a socket at path.
func serveAs(t *testing.T, uid int, path string, o Options) *Server {
	t.Helper()
	made := make(chan *net.UnixListener)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread has other credentials, and ends
		defer close(made)
		if _, _, errno := syscall.RawSyscall(unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)); errno != 0 {
			t.Error(errno)
			return
		}
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err == nil {
			err = unix.Bind(fd, &unix.SockaddrUnix{Name: path})
		}
		if err == nil {
			err = unix.Listen(fd, 8)
		}
		if err != nil {
			t.Error(err)
			return
		}
		f := os.NewFile(uintptr(fd), path)
		defer f.Close()
		l, err := net.FileListener(f)
		if err != nil {
			t.Error(err)
			return
		}
		made <- l.(*net.UnixListener)
	}()
	l := <-made
	if l == nil {
		t.FailNow()
	}
	o.Group = -1
	s := serve(o, l)
	t.Cleanup(func() { s.Close() })
	return s
}

// Root sees the instances of all users, and is not fooled by one that answers in another user's place; others see their own.
func TestInstancesOfAllUsers(t *testing.T) {
	testkit.CheckLeaks(t)
	if os.Getuid() != 0 {
		t.Skip("no root: instances of other users are not tried")
	}
	r := runtimeOf(t)
	const one, two = 12345, 12346
	dirs := []string{r.inTmp(one), filepath.Join(r.Run, "12346", runDirName)}
	for i, uid := range []int{one, two} {
		if err := os.MkdirAll(dirs[i], 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(dirs[i], uid, -1); err != nil {
			t.Fatal(err)
		}
	}
	os.Chmod(filepath.Dir(dirs[1]), 0o755)
	o := Options{Backend: Backend{Status: runSample("of another")}, Log: slog.New(slog.DiscardHandler)}
	serveAs(t, one, filepath.Join(dirs[0], "run-1-a.sock"), o)
	serveAs(t, two, filepath.Join(dirs[1], "run-2-b.sock"), o)
	got := Instances(r, "")
	if len(got) != 2 || got[0].UID != one || got[1].UID != two || got[0].User != "12345" || got[0].Program != "of another" {
		t.Errorf("%+v", got)
	}
	// A name, or being the only one, does not lead root to what another user has made.
	if got := OwnInstances(r); len(got) != 0 {
		t.Errorf("chosen without being asked for: %+v", got)
	}
	if h := CheckHealth(r, filepath.Join(t.TempDir(), "none.sock"), 0); h.Reason != "viasocks is not running here" {
		t.Errorf("another user's instance was asked: %+v", h)
	}
	user := r
	user.UID = one // as far as the choice of directories goes
	if got := Instances(user, ""); len(got) != 1 || got[0].UID != one {
		t.Errorf("%+v", got)
	}

	// Somebody who may write to the directory of one, and is not one.
	false1 := filepath.Join(dirs[0], "run-3-c.sock")
	os.Chmod(dirs[0], 0o777)
	serveAs(t, two, false1, o)
	os.Chmod(dirs[0], 0o700)
	os.Chown(false1, one, -1)
	if got := Instances(r, ""); len(got) != 2 {
		t.Errorf("%+v", got)
	}
	// What another user left behind stays: root only looks.
	stale(t, dirs[0], "run-4-dead.sock")
	os.Chown(filepath.Join(dirs[0], "run-4-dead.sock"), one, -1)
	if Instances(r, ""); len(names(t, dirs[0])) != 3 {
		t.Error(names(t, dirs[0]))
	}
}

// A user who can reach the socket of another is refused by the credentials.
func TestRunPeers(t *testing.T) {
	testkit.CheckLeaks(t)
	if os.Getuid() != 0 {
		t.Skip("no root: another user's connection is not tried")
	}
	r := runtimeOf(t)
	listenRun(t, r, "x")
	dir := filepath.Join(r.XDG, runDirName)
	path := filepath.Join(dir, names(t, dir)[0])
	try := func() (status int, err error) {
		done := make(chan struct{})
		go func() {
			defer close(done)
			resp, e := askAs(path, 65534, nil)
			if err = e; err == nil {
				status = resp.StatusCode
			}
		}()
		<-done
		return status, err
	}
	if _, err := try(); err == nil {
		t.Error("another user can connect")
	}
	os.Chmod(dir, 0o755)
	os.Chmod(path, 0o666)
	if status, err := try(); err != nil || status != 403 {
		t.Errorf("%d, %v", status, err)
	}
}

func TestRuntimeOf(t *testing.T) {
	r := RuntimeOf([]string{"A=b", "XDG_RUNTIME_DIR=/run/user/7"})
	if r.XDG != "/run/user/7" || r.UID != os.Geteuid() || r.inTmp(5) != "/tmp/viasocks-5" {
		t.Errorf("%+v", r)
	}
	for _, bad := range []string{"", "relative", "/nonexistent", "/dev/null"} {
		r.XDG, r.Run = bad, "/nonexistent"
		if got := r.candidates(); len(got) != 1 {
			t.Errorf("%s: %v", bad, got)
		}
	}
}

func TestWriteInstances(t *testing.T) {
	var b strings.Builder
	all := []Instance{
		{
			PID:   12,
			UID:   0,
			User:  "root",
			Mode:  ModeUp,
			Proxy: "socks5://10.0.0.1:1080",
			State: Ready,
			Since: *at(3 * time.Hour),
			Flows: 17,
			Up:    5 << 20,
			Down:  9 << 30,
		},
		{
			PID:     4711,
			UID:     1000,
			User:    "alice",
			Mode:    ModeRun,
			Program: "ev\x1b[31mil",
			Proxy:   "3 servers",
			State:   Ready,
			Since:   *at(time.Minute),
		},
		{PID: 4712, UID: 1000, User: "alice", Mode: ModeRun, State: NoAnswer},
	}
	if err := WriteInstances(&b, all, now); err != nil {
		t.Fatal(err)
	}
	b.WriteString("\n")
	if err := WriteInstances(&b, nil, now); err != nil {
		t.Fatal(err)
	}
	golden(t, "ps.txt", b.String())
}
