package hosttest

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/harness"
)

// TestActiveFTP: curl on the host downloads and uploads with EPRT and with PORT, from a vsftpd that has no PASV, by BIND of
// dante. A reload switches it off and on.
func TestActiveFTP(t *testing.T) {
	if !apart(t) {
		return
	}
	w := newWorld(t)
	for _, name := range []string{"vsftpd", "curl"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Skipf("%s is not installed (scripts/deps.sh)", name)
		}
	}
	w.binding()
	conf, files, content := harness.FTPServer(t, client4)
	w.start("world", nil, nil, "vsftpd", conf)
	rec := newRecorder(w)
	rec.to(netipAddrPort(proxy4, 1080))
	before := w.state()
	w.configure("proxy socks5://" + proxy4 + "\n")
	d := w.up("--config", configFile)
	got := filepath.Join(t.TempDir(), "got")
	curl := func(args ...string) (string, error) {
		return try("host", nil, append([]string{"curl", "-sSv", "--max-time", "30", "--ftp-port", "-"}, args...)...)
	}
	w.eventually(20*time.Second, "the FTP server answers", func() bool {
		c, err := w.from(client4, client4, 21)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	if out, err := curl("-o", got, "ftp://"+client4+"/file"); err == nil {
		t.Errorf("active FTP works without --ftp-active: %s", out)
	}
	w.configure("proxy socks5://" + proxy4 + "\nftp-active 21\n")
	d.reload()
	for verb, flags := range map[string][]string{"EPRT": nil, "PORT": {"--disable-eprt"}} {
		if out, err := curl(append(flags, "-o", got, "ftp://"+client4+"/file")...); err != nil {
			t.Errorf("%s: download: %v", verb, out)
		}
		if b, _ := os.ReadFile(got); !bytes.Equal(b, content) {
			t.Errorf("%s: %d other bytes came", verb, len(b))
		}
		if out, err := curl(append(flags, "-T", got, "ftp://"+client4+"/up/"+verb)...); err != nil {
			t.Errorf("%s: upload: %v", verb, out)
		}
		w.eventually(20*time.Second, "the whole upload", func() bool {
			b, _ := os.ReadFile(filepath.Join(files, "up", verb))
			return bytes.Equal(b, content)
		})
	}
	if err := d.stop(); err != nil {
		t.Error(err)
	}
	rec.nothingLeft(t, "active FTP")
	w.same("after the stop", before, w.state())
}
