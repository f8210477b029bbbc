package resolved

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/godbus/dbus/v5"

	"github.com/viasocks/viasocks/stack/testkit"
)

func TestMain(m *testing.M) { testkit.Main(m) }

const busConfig = `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>session</type><listen>unix:path=%s</listen><auth>EXTERNAL</auth>
<policy context="default"><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/></policy></busconfig>`

// startBus runs a message bus of the test's own. stop ends it before the test does.
func startBus(t *testing.T) (address string, stop func()) {
	t.Helper()
	if _, err := exec.LookPath("dbus-daemon"); err != nil {
		t.Skip("dbus-daemon is not installed: scripts/deps.sh test")
	}
	dir := t.TempDir()
	socket, conf := filepath.Join(dir, "bus"), filepath.Join(dir, "conf")
	if err := os.WriteFile(conf, fmt.Appendf(nil, busConfig, socket), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("dbus-daemon", "--config-file="+conf, "--nofork")
	stop = startWithTest(t, cmd)
	testkit.Eventually(t, "the bus", func() bool {
		c, err := net.Dial("unix", socket)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return "unix:path=" + socket, stop
}

// startWithTest starts a command that ends by stop, when the test is over, and also when the test process is killed.
func startWithTest(t *testing.T, cmd *exec.Cmd) (stop func()) {
	t.Helper()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started, end, over := make(chan error), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(over)
		// The signal comes when the thread ends that started the process. It is this one, which stays for as long.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		<-end
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	stop = sync.OnceFunc(func() { close(end); <-over })
	t.Cleanup(stop)
	return stop
}

const envBus = "RESOLVED_TEST_BUS" // set in a test process that is to be killed: where it writes the PID of its bus

// TestBusEndsWithTest: when the test process is killed the bus that it started does not stay.
func TestBusEndsWithTest(t *testing.T) {
	if file := os.Getenv(envBus); file != "" {
		cmd := exec.Command("sleep", "60")
		startWithTest(t, cmd)
		if err := os.WriteFile(file, fmt.Append(nil, cmd.Process.Pid), 0o600); err != nil {
			t.Fatal(err)
		}
		testkit.Pace(testkit.Patience) // until it is killed
		return
	}
	file := filepath.Join(t.TempDir(), "pid")
	test := exec.Command(os.Args[0], "-test.run=^TestBusEndsWithTest$")
	test.Env = append(os.Environ(), envBus+"="+file)
	kill := startWithTest(t, test)
	pid := 0
	testkit.Eventually(t, "PID", func() bool {
		b, _ := os.ReadFile(file)
		_, err := fmt.Sscan(string(b), &pid)
		return err == nil && pid > 1
	})
	kill()
	testkit.Eventually(t, "end of what the killed test started", func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err != nil || strings.Contains(string(b), ") Z ") // nobody may be there to reap it
	})
}

// fake is a systemd-resolved.
type fake struct {
	conn *dbus.Conn

	mu      sync.Mutex
	links   map[int32]*fakeLink
	calls   []string
	flushes int
	refuse  map[string]string        // method to the name of an error
	hang    map[string]chan struct{} // a method waits for that
}

type fakeLink struct {
	Servers []server
	Domains []domain
	Words   map[string]string
}

// startFake puts a fake on the bus, which knows these devices.
func startFake(t *testing.T, address string, indexes ...int32) *fake {
	t.Helper()
	conn, err := dbus.Connect(address)
	if err != nil {
		t.Fatal(err)
	}
	f := &fake{conn: conn, links: map[int32]*fakeLink{}, refuse: map[string]string{}, hang: map[string]chan struct{}{}}
	t.Cleanup(f.stop)
	for _, i := range indexes {
		f.links[i] = &fakeLink{Words: map[string]string{}}
		path := dbus.ObjectPath(fmt.Sprintf("%s/link/_%d", objectPath, i))
		if err := conn.Export(fakeProperties{f, i}, path, "org.freedesktop.DBus.Properties"); err != nil {
			t.Fatal(err)
		}
	}
	word := func(method string) func(int32, string) *dbus.Error {
		return func(i int32, w string) *dbus.Error {
			return f.change(method, i, func(l *fakeLink) { l.Words[method] = w })
		}
	}
	err = conn.ExportMethodTable(map[string]any{
		"GetLink": func(i int32) (dbus.ObjectPath, *dbus.Error) {
			return dbus.ObjectPath(fmt.Sprintf("%s/link/_%d", objectPath, i)), f.change("GetLink", i, func(*fakeLink) {})
		},
		"SetLinkDNS": func(i int32, s []server) *dbus.Error {
			return f.change("SetLinkDNS", i, func(l *fakeLink) { l.Servers = s })
		},
		"SetLinkDomains": func(i int32, d []domain) *dbus.Error {
			return f.change("SetLinkDomains", i, func(l *fakeLink) { l.Domains = d })
		},
		"SetLinkDefaultRoute": func(i int32, on bool) *dbus.Error {
			return f.change("SetLinkDefaultRoute", i, func(l *fakeLink) { l.Words["SetLinkDefaultRoute"] = fmt.Sprint(on) })
		},
		"SetLinkDNSOverTLS": word("SetLinkDNSOverTLS"), "SetLinkDNSSEC": word("SetLinkDNSSEC"),
		"SetLinkLLMNR": word("SetLinkLLMNR"), "SetLinkMulticastDNS": word("SetLinkMulticastDNS"),
		"RevertLink": func(i int32) *dbus.Error {
			return f.change("RevertLink", i, func(l *fakeLink) { *l = fakeLink{Words: map[string]string{}} })
		},
		"FlushCaches": func() *dbus.Error {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.flushes++
			return nil
		},
	}, objectPath, strings.TrimSuffix(manager, "."))
	if err != nil {
		t.Fatal(err)
	}
	if r, err := conn.RequestName(service, dbus.NameFlagDoNotQueue); err != nil || r != dbus.RequestNameReplyPrimaryOwner {
		t.Fatal(r, err)
	}
	return f
}

func (f *fake) stop() { _ = f.conn.Close() }

func (f *fake) change(method string, i int32, do func(*fakeLink)) *dbus.Error {
	f.mu.Lock()
	hang := f.hang[method]
	f.mu.Unlock()
	if hang != nil {
		<-hang
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, method)
	if name := f.refuse[method]; name != "" {
		return dbus.NewError(name, []any{method + " is refused"})
	}
	l := f.links[i]
	if l == nil {
		return dbus.NewError(service+".NoSuchLink", []any{fmt.Sprintf("Link %d not known", i)})
	}
	do(l)
	return nil
}

// link is a copy of what the fake holds of a device.
func (f *fake) link(i int32) fakeLink {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := *f.links[i]
	l.Words = maps.Clone(l.Words)
	return l
}

func (f *fake) with(do func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	do()
}

type fakeProperties struct {
	f *fake
	i int32
}

func (p fakeProperties) Get(_, name string) (v dbus.Variant, err *dbus.Error) {
	return v, p.f.change("Get", p.i, func(l *fakeLink) {
		switch name {
		case "DNS":
			v = dbus.MakeVariant(append([]server{}, l.Servers...))
		case "Domains":
			v = dbus.MakeVariant(append([]domain{}, l.Domains...))
		}
	})
}

func TestErrorNames(t *testing.T) {
	err := fmt.Errorf("SetLinkDNS: %w", error(*dbus.NewError(service+".LinkBusy", nil)))
	if !isError(err, service+".LinkBusy") || isError(err, service+".NoSuchLink") || isError(errors.New("x"), "x") {
		t.Error(err)
	}
}
