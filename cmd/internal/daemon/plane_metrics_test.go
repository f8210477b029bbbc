package daemon

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/metrics"
	"github.com/viasocks/viasocks/stack/testkit"
)

// scraped are the metrics of a data plane that has carried something, by name and labels.
func scraped(t *testing.T) (text string, values map[string]float64) {
	c, _ := newCarried(t)
	c.works("measured")
	path := filepath.Join(t.TempDir(), "m.sock")
	end, err := serveMetrics(&config.Config{Metrics: metrics.Address{Path: path}}, watched{
		plane: func() *plane {
			return c.u.plane
		}, ready: func() bool { return true }, dropped: func() (uint64, error) { return 5, nil },
	}, "test", c.u.log)
	if err != nil {
		t.Fatal(err)
	}
	defer end()
	testkit.Eventually(t, "the loops to have been asked, and the flows to be over", func() bool {
		text, values = scrape(t, path)
		return values["viasocks_loop_lag_seconds_count"] > 0 && values[`viasocks_flows{proto="tcp"}`] == 0
	})
	return text, values
}

func scrape(t *testing.T, path string) (text string, values map[string]float64) {
	client := http.Client{Timeout: testkit.Patience, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		},
	}}
	r, err := client.Get("http://viasocks/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil || r.StatusCode != http.StatusOK {
		t.Fatal(r.Status, err)
	}
	values = map[string]float64{}
	for line := range strings.Lines(string(b)) {
		if at := strings.LastIndexByte(line, ' '); line[0] != '#' && at > 0 {
			values[line[:at]], _ = strconv.ParseFloat(strings.TrimSpace(line[at+1:]), 64)
		}
	}
	return string(b), values
}

// TestMetrics: what was carried is found in the metrics, and no address of anybody.
func TestMetrics(t *testing.T) {
	testkit.CheckLeaks(t)
	text, values := scraped(t)
	for _, name := range []string{
		`viasocks_dials_total{outcome="granted",proto="tcp",upstream="proxy"}`,
		`viasocks_dials_total{outcome="granted",proto="udp",upstream="proxy"}`,
		`viasocks_socks_replies_total{reply="succeeded",upstream="proxy"}`,
		`viasocks_handshake_seconds_count{upstream="proxy"}`,
		`viasocks_upstream_bytes_total{direction="up",proto="tcp",upstream="proxy"}`,
		`viasocks_upstream_bytes_total{direction="down",proto="tcp",upstream="proxy"}`,
		`viasocks_upstream_bytes_total{direction="up",proto="udp",upstream="proxy"}`,
		`viasocks_upstream_bytes_total{direction="down",proto="udp",upstream="proxy"}`,
		`viasocks_flows_total{proto="tcp"}`, `viasocks_flows_total{proto="udp"}`, `viasocks_dns_questions_total`,
		`viasocks_tun_frames_total{direction="in"}`, `viasocks_tun_frames_total{direction="out"}`, `viasocks_ready`,
	} {
		if values[name] <= 0 {
			t.Errorf("%s is %v", name, values[name])
		}
	}
	if n := values["viasocks_tun_dropped_total"]; n != 5 {
		t.Errorf("the TUN has dropped %v", n)
	}
	for _, secret := range []string{farTCP.Addr().String(), "127.0.0.1", "198.18.", "al@"} {
		if strings.Contains(text, secret) {
			t.Errorf("%q is in the metrics", secret)
		}
	}
	if len(values) > 1000 {
		t.Errorf("%d series", len(values))
	}
}

const scripts = "../../../scripts/"

// TestDashboard: the dashboard and the alert rules use only metrics and values of labels that exist, and promtool takes the
// rules.
func TestDashboard(t *testing.T) {
	_, values := scraped(t)
	names := metricNames(values)
	b, err := os.ReadFile(scripts + "viasocks-dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	var board struct {
		Title  string
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(b, &board); err != nil {
		t.Fatal(err)
	}
	var exprs strings.Builder
	for _, p := range board.Panels {
		for _, x := range p.Targets {
			names.check(t, "panel "+p.Title, x.Expr, 1)
			fmt.Fprintf(
				&exprs,
				"      - record: a:b\n        expr: %q\n",
				strings.NewReplacer("$__rate_interval", "1m", "$instance", ".*").Replace(x.Expr),
			)
		}
	}
	rules, err := os.ReadFile(scripts + "viasocks-alerts.yml")
	if err != nil {
		t.Fatal(err)
	}
	names.check(t, "alerts", string(rules), 10)
	takenByPromtool(t, exprs.String())
}

// names are those of the metrics that there are, and their labels with the values.
type names map[string]bool

func metricNames(values map[string]float64) names {
	all := names{}
	for key := range values {
		name, labels, _ := strings.Cut(key, "{")
		all[name] = true
		for _, l := range regexp.MustCompile(`(\w+)="(.*?)"`).FindAllString(labels, -1) {
			all[l] = true
		}
	}
	return all
}

// check wants text to use metrics and labels that there are, and at least so many.
func (all names) check(t *testing.T, what, text string, least int) {
	t.Helper()
	found := regexp.MustCompile(`\b(viasocks|process|go)_\w+`).FindAllString(text, -1)
	for _, n := range found {
		if !all[n] {
			t.Errorf("%s: there is no metric %s", what, n)
		}
	}
	for _, m := range regexp.MustCompile(`\b(proto|direction|outcome|reason)=~?"([^"$]*)"`).FindAllStringSubmatch(text, -1) {
		for v := range strings.SplitSeq(m[2], "|") {
			if l := fmt.Sprintf("%s=%q", m[1], v); !all[l] {
				t.Errorf("%s: no metric has %s", what, l)
			}
		}
	}
	if len(found) < least {
		t.Errorf("%s: it uses only %d metrics", what, len(found))
	}
}

// takenByPromtool has promtool check the alert rules, and the expressions of the panels, which are given as rules.
func takenByPromtool(t *testing.T, exprs string) {
	t.Helper()
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("no promtool (Debian package prometheus): the syntax of rules and panels was not checked")
	}
	panels := filepath.Join(t.TempDir(), "panels.yml")
	all := "groups:\n  - name: panels\n    rules:\n" + exprs
	if err := os.WriteFile(panels, []byte(all), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for _, file := range []string{scripts + "viasocks-alerts.yml", panels} {
		if out, err := exec.CommandContext(ctx, promtool, "check", "rules", "--lint=none", file).CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", file, err, out)
		}
	}
	if out, err := exec.CommandContext(ctx, promtool, "test", "rules", "testdata/alerts_test.yml").CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestMetricsRecord: a socket that a killed viasocks left is found and removed; one that somebody uses is not.
func TestMetricsRecord(t *testing.T) {
	dir := t.TempDir()
	socket, at := filepath.Join(dir, "control-1.sock"), metrics.Address{Path: filepath.Join(dir, "m.sock")}
	if left, err := forgetMetrics(socket); left != "" || err != nil {
		t.Errorf("without a record: %q, %v", left, err)
	}
	if _, err := recordMetrics(socket, at); err != nil {
		t.Fatal(err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: at.Path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	if left, err := forgetMetrics(socket); left != "" || err != nil {
		t.Errorf("of a live one: %q, %v", left, err)
	}
	end, err := recordMetrics(socket, at)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if left, err := forgetMetrics(socket); left != at.Path || err != nil {
		t.Errorf("of a dead one: %q, %v", left, err)
	}
	end()
	if files, _ := os.ReadDir(dir); len(files) > 0 {
		t.Errorf("left: %v", files)
	}
}
