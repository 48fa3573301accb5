//go:build fleet

package fleettest

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/fieldmaskpb"

	virtfleet "virtfleet.dev/go"
	computev1 "virtfleet.dev/go/compute/v1"
	typev1 "virtfleet.dev/go/type/v1"
	"virtfleet.dev/go/virtfleettest"
)

func TestRefusalsAreReasonsWithValues(t *testing.T) {
	t.Parallel()
	eachWorld(t, func(t *testing.T, w world) {
		client := w.dial(t)
		domain := made(t, client, "nodes/n1")
		update := func(etag, title string) error {
			operation, err := client.Domains.UpdateDomain(t.Context(), &computev1.UpdateDomainRequest{
				Domain:     &computev1.Domain{Name: domain.GetName(), Etag: etag, DisplayName: title},
				UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"display_name"}},
			})
			if err != nil {
				return err
			}
			_, err = operation.Wait(t.Context())
			return err
		}
		if err := update(domain.GetEtag(), "first"); err != nil {
			t.Fatal(err)
		}
		if err := update(domain.GetEtag(), "second"); !errors.Is(err, virtfleet.ErrEtagMismatch) || !errors.Is(err, virtfleet.ErrAborted) {
			t.Errorf("an old etag: %v", err)
		}
		now, err := client.Domains.GetDomain(t.Context(), &computev1.GetDomainRequest{Name: domain.GetName()})
		if err != nil || now.GetDisplayName() != "first" {
			t.Error(now, err)
		}

		operation, err := client.Domains.SuspendDomain(t.Context(), &computev1.SuspendDomainRequest{Name: domain.GetName()})
		if err == nil {
			_, err = operation.Wait(t.Context())
		}
		var typed *virtfleet.Error
		if !errors.Is(err, virtfleet.ErrWrongState) || !errors.As(err, &typed) || typed.Metadata["state"] == "" {
			t.Errorf("a pause of what does not run: %+v", err)
		}

		card := func() *computev1.DomainSpec {
			mac := "06:07:08:09:0a:0b"
			spec := small()
			spec.Interfaces = map[string]*computev1.Interface{"lan": {MacAddress: &mac}}
			return spec
		}
		holder, err := create(t.Context(), client, "nodes/n1", unique(), card())
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := remove(t.Context(), client, holder.GetName()); err != nil {
				t.Error(err)
			}
		}()
		_, err = create(t.Context(), client, "nodes/n1", unique(), card())
		if !errors.Is(err, virtfleet.ErrIdentityInUse) || !errors.As(err, &typed) || typed.Holder != holder.GetName() {
			t.Errorf("a MAC that is taken: %v, holder %q", err, typed.Holder)
		}
		_, err = create(t.Context(), client, "nodes/n1", "Not an id", small())
		if !errors.Is(err, virtfleet.ErrInvalidArgument) || !errors.As(err, &typed) ||
			!slices.ContainsFunc(typed.Fields, func(field virtfleet.Field) bool { return field.Path == "domain_id" }) {
			t.Errorf("a bad id: %v, fields %v", err, typed.Fields)
		}
	})
}

func TestAnOperationIsWaitedForOverKilledGateways(t *testing.T) {
	t.Parallel()
	eachWorld(t, func(t *testing.T, w world) {
		client := w.dial(t)
		domain := made(t, client, "nodes/n1")
		operation, err := client.Domains.StartDomain(t.Context(), &computev1.StartDomainRequest{Name: domain.GetName()})
		if err != nil {
			t.Fatal(err)
		}
		w.killGateway(t)
		again := virtfleet.OperationNamed[*computev1.Domain](client, operation.Name())
		var seen []*typev1.OperationMetadata
		started, err := again.Wait(t.Context(), virtfleet.WithProgress(func(metadata *typev1.OperationMetadata) {
			seen = append(seen, metadata)
		}))
		if err != nil || started.GetStatus().GetState() != computev1.DomainState_DOMAIN_STATE_RUNNING {
			t.Fatal(started, err)
		}
		if last := seen[len(seen)-1]; last.GetTarget() != domain.GetName() || !strings.HasSuffix(last.GetMethod(), "StartDomain") {
			t.Error(last)
		}
	})
}

func TestADeadlineEndsACallToANodeThatDoesNotAnswer(t *testing.T) {
	t.Parallel()
	eachWorld(t, func(t *testing.T, w world) {
		client := w.dial(t)
		domain := made(t, client, "nodes/n2")
		thaw := w.freeze(t, "nodes/n2")
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		_, err := client.Domains.GetDomain(ctx, &computev1.GetDomainRequest{Name: domain.GetName()})
		if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, virtfleet.ErrDeadlineExceeded) {
			t.Error(err)
		}
		thaw()
		until(t, "it answers again", func() bool {
			_, err := client.Domains.GetDomain(t.Context(), &computev1.GetDomainRequest{Name: domain.GetName()})
			return err == nil
		})
	})
}

func TestMutationsOverLostConnectionsHappenOnce(t *testing.T) {
	t.Parallel()
	fleet := virtfleettest.Start(t, virtfleettest.Nodes(2))
	client := fleet.Dial(t)
	ctx, cancel := context.WithCancel(t.Context())
	var cutting sync.WaitGroup
	cutting.Go(func() {
		for ctx.Err() == nil {
			fleet.CutConnections(t)
			time.Sleep(30 * time.Millisecond)
		}
	})
	generations := make([]int64, 8)
	var working sync.WaitGroup
	for worker := range generations {
		working.Go(func() {
			for {
				domain, err := create(t.Context(), client, "nodes/n1", unique(), small())
				if errors.Is(err, virtfleet.ErrUnavailable) {
					continue // four times in a row; another id
				}
				if err != nil {
					t.Errorf("a creation that was repeated: %v", err)
					return
				}
				generations[worker] = domain.GetGeneration()
				return
			}
		})
	}
	working.Wait()
	cancel()
	cutting.Wait()
	for _, generation := range generations {
		if generation != 1 {
			t.Errorf("generation %d", generation)
		}
	}
}
