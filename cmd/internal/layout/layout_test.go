package layout

import (
	"bytes"
	"encoding/json"
	"os/exec"
	"strings"
	"testing"
)

const self = "github.com/viasocks/viasocks"

// Families of packages, by prefix. Standard library packages have no dot in their first path element.
const (
	gvisor     = "gvisor.dev/gvisor"
	netlink    = "github.com/vishvananda/netlink"
	nftables   = "github.com/google/nftables"
	wgtun      = "golang.zx2c4.com/wireguard/tun"
	xsys       = "golang.org/x/sys"
	dnsmessage = "golang.org/x/net/dns/dnsmessage"
	nettest    = "golang.org/x/net/nettest"
	cryptobyte = "golang.org/x/crypto/cryptobyte"
	goleak     = "go.uber.org/goleak"
	pflag      = "github.com/spf13/pflag"
	prometheus = "github.com/prometheus/client_golang"
	bubbletea  = "charm.land/bubbletea/v2"
	xansi      = "github.com/charmbracelet/x/ansi"
	godbus     = "github.com/godbus/dbus/v5"
	edits      = "github.com/agnivade/levenshtein"
)

// table is the import table of the design: what each package may import besides the standard library, itself, and
// (in tests) nettest, goleak and our testkit. A package of ours without a row fails the test.
var table = []struct {
	pkg    string   // below self; "/..." takes all below
	may    []string // prefixes
	tests  []string // prefixes that its tests may import besides
	reason string
}{
	{"stack/loop", []string{xsys}, nil,
		"the event loop that socks, route/relay and tun share: it knows sockets and nothing of what is said on them"},
	{"stack/count", nil, nil,
		"the tables of counters of all layers: it knows none of them"},
	{"stack/atomicfile", nil, nil,
		"replaces files atomically, for all layers: it knows none of them"},
	{"stack/testkit", []string{goleak}, nil,
		"the waits and leak checks of all tests: it knows no layer, so every layer's tests may import it"},
	{"stack/flow", nil, nil,
		"the nouns of the seam: an import here would reach both sides of it"},
	{"socks", []string{self + "/stack/count", self + "/stack/loop", xsys}, []string{self + "/socks/sockstest"},
		"a SOCKS client that knows nothing of flows can be tested, and used, without a TUN"},
	{"socks/sockstest", []string{xsys, self + "/socks"}, nil,
		"a server that misbehaves; nothing of the data plane"},
	{"tun", []string{self + "/stack/loop", wgtun, netlink, xsys}, []string{self + "/tun/tuntest", self + "/tun/netns"},
		"frames are bytes here: what is in them is stack's concern. Its queues wait in the poller of the loops"},
	{"tun/tuntest", []string{self + "/tun"}, nil,
		"stands in for tun in tests of the layers above"},
	{"tun/netns", []string{netlink, xsys}, []string{self + "/tun"},
		"namespaces are made before there is a stack"},
	{
		"stack",
		[]string{self + "/stack/count", self + "/stack/flow", self + "/tun", gvisor, xsys},
		[]string{self + "/tun/tuntest", self + "/stack/stacktest"},
		"the only importer of gVisor: another stack would be another package, and nothing else would change",
	},
	{
		"stack/stacktest",
		[]string{self + "/stack/flow", self + "/tun", gvisor, xsys},
		[]string{self + "/stack", self + "/tun/tuntest"},
		"the app's side of the same frames",
	},
	{"route/relay", []string{self + "/stack/count", self + "/stack/flow", self + "/stack/loop", xsys}, nil,
		"moves bytes between two ends that it knows only by interface"},
	{"route/dns", []string{self + "/stack/atomicfile", self + "/stack/count", self + "/stack/flow", dnsmessage}, nil,
		"answers questions; how they reach the resolver is handed in"},
	{"route/portmap", nil, nil,
		"answers requests for ports; who makes the ports is handed in"},
	{"route/ftp", []string{self + "/stack/flow"}, nil,
		"rewrites what a program says to an FTP server; who listens for the server is handed in"},
	{"route/sniff", []string{self + "/stack/flow", self + "/stack/loop", cryptobyte}, nil,
		"reads the first bytes of a connection: what their name is good for is route's concern"},
	{
		"route",
		[]string{
			self + "/stack/count", self + "/stack/flow", self + "/stack/loop",
			self + "/route/relay", self + "/route/dns", self + "/route/ftp", self + "/route/portmap", self + "/route/sniff",
			self + "/socks", xsys,
		},
		[]string{self + "/socks/sockstest"},
		"decides who carries a flow; the packets are stack's, the kernel is route/kernel's",
	},
	{"route/kernel", []string{netlink, nftables, xsys}, nil,
		"changes the host and undoes it: must work without a data plane"},
	{"cmd/internal/hosttest", []string{self + "/...", xsys}, []string{netlink, dnsmessage, godbus},
		"its tests configure a host as DHCP clients do, with nothing between one message to the kernel and the next, " +
			"ask for names, " +
			"and stand in for systemd-resolved"},
	{"cmd/internal/privsock", []string{xsys}, nil,
		"makes unix sockets that only their owner can use: control, metrics and published ports share it, " +
			"and it knows none of them"},
	{"cmd/internal/publish", []string{self + "/cmd/internal/privsock", xsys}, []string{self + "/stack/testkit"},
		"carries connections from outside to a program, and knows no other flows"},
	{"cmd/internal/resolved", []string{godbus, xsys}, []string{self + "/cmd/internal/harness"},
		"speaks to systemd-resolved, and knows a device by its index and nothing else of ours"},
	{
		"cmd/internal/doctor",
		[]string{self + "/cmd/internal/config", self + "/cmd/internal/conform", self + "/cmd/internal/control",
			self + "/cmd/internal/daemon", self + "/route/dns", self + "/route/kernel", self + "/route/relay", self + "/socks",
			self + "/stack/flow", self + "/stack/loop", self + "/tun/netns", xsys},
		[]string{self + "/cmd/internal/harness", self + "/socks/sockstest"},
		"looks at a host and a proxy from outside the data plane: what it finds must not depend on what may be broken",
	},
	{"cmd/internal/process", []string{self + "/cmd/internal/control", self + "/stack/atomicfile", xsys}, nil,
		"keeps our own process in order, and knows nothing of flows and of the host; control makes texts fit for one line"},
	{"cmd/internal/owner", []string{self + "/route/kernel", self + "/stack/flow", self + "/tun/netns"}, []string{xsys},
		"finds the processes behind sockets in /proc; the kernel's side of that is in tun/netns and route/kernel"},
	{"cmd/internal/handover", []string{self + "/stack", self + "/stack/flow", xsys}, []string{self + "/stack/testkit"},
		"what two processes say to each other when one takes the host over; what they do then is daemon's"},
	{"cmd/internal/metrics", []string{self + "/cmd/internal/privsock", self + "/stack/count", prometheus, xsys}, nil,
		"turns tables of counters into metrics: nothing else knows how Prometheus wants them"},
	{"cmd/internal/top", []string{self + "/cmd/internal/control", bubbletea, xansi, xsys}, nil,
		"the live view: bubbletea draws it, because keys, sizes and the states of terminals are its concern; " +
			"it knows only what the " +
			"control socket says"},
	{"cmd/internal/config", []string{self + "/...", pflag, edits, xsys}, nil,
		"reads what the user has written, and tells which word a mistyped one stands for"},
	{"cmd/...", []string{self + "/...", pflag, xsys}, nil,
		"glue that no layer may import"},
}

type listed struct {
	ImportPath   string
	Imports      []string
	TestImports  []string
	XTestImports []string
}

func TestImports(t *testing.T) {
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports,TestImports,XTestImports", self+"/...").Output()
	if err != nil {
		t.Fatalf("cannot list the packages: %v", err)
	}
	seen := 0
	for dec := json.NewDecoder(bytes.NewReader(out)); dec.More(); {
		var p listed
		if err := dec.Decode(&p); err != nil {
			t.Fatal(err)
		}
		seen++
		checkPackage(t, p)
	}
	if seen < 3 {
		t.Fatalf("only %d packages listed", seen)
	}
}

func checkPackage(t *testing.T, p listed) {
	name := strings.TrimPrefix(p.ImportPath, self+"/")
	for _, row := range table {
		if tree, ok := strings.CutSuffix(row.pkg, "..."); name != row.pkg && (!ok || !strings.HasPrefix(name+"/", tree)) {
			continue
		}
		for _, imp := range p.Imports {
			if !allowed(imp, p.ImportPath, row.may) {
				t.Errorf("%s imports %s, which it may not: %s", p.ImportPath, imp, row.reason)
			}
		}
		inTests := append(append([]string{goleak, nettest, self + "/stack/testkit"}, row.may...), row.tests...)
		for _, imp := range append(p.TestImports, p.XTestImports...) {
			if !allowed(imp, p.ImportPath, inTests) {
				t.Errorf("a test of %s imports %s, which it may not: %s", p.ImportPath, imp, row.reason)
			}
		}
		return
	}
	t.Errorf("%s has no row in the import table: the layout is fixed, say why it grows", p.ImportPath)
}

func allowed(imp, pkg string, may []string) bool {
	first, _, _ := strings.Cut(imp, "/")
	if !strings.Contains(first, ".") || imp == pkg || imp == "C" {
		return true
	}
	for _, m := range may {
		// A package of ours is meant alone, not with what lies below it: tun is not tun/netns.
		if tree, ok := strings.CutSuffix(m, "..."); ok && strings.HasPrefix(imp, tree) {
			return true
		} else if strings.HasPrefix(m, self+"/") {
			if imp == m {
				return true
			}
		} else if imp == m || strings.HasPrefix(imp, m+"/") {
			return true
		}
	}
	return false
}
